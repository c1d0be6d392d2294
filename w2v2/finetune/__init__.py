"""Fine-tuning with `Trainer`: pretrained weights, transcribed or labelled audio in; a stock model and its scores out.

Reading order: `arguments`, `stock_flags` (flags); `batching`, `evaluation`, `trainer` (shared by both tasks); for
recognition `normalisation`, `text`, `ctc_data`, `subsets`, `beam_search`, `ctc`, `transcription`; for labels of whole
utterances `labels`, `classifier`, `label_scores`.
"""

"""Fine-tuning with `Trainer`: a pretrained folder and transcribed or labelled utterances in, a stock model and its scores out.

Reading order: `arguments`, `task_arguments` (the flags); recognition: `text`, `subsets`, `ctc_data`, `ctc`, `decoding`, `recognition`;
labels of whole utterances: `labels`, `classification`; shared by both: `batching` (updates of so many seconds), `trainer`.
"""

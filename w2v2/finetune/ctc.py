"""A recogniser: `Wav2Vec2ForCTC`, and its `Trainer` with error rates that the batch size does not move.

Shapes: B utterances, T latent frames, U units of a transcript, V entries of the vocabulary, W words of a hypothesis,
K settings of the decoder.
"""

from typing import Any

import torch
from transformers import TrainerCallback, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.trainer_utils import EvalLoopOutput

from w2v2.errors import UserError
from w2v2.evaluate.error_rates import error_rates
from w2v2.finetune.ctc_data import SpeechDataset
from w2v2.finetune.decoding import BeamDecoder
from w2v2.finetune.text import BLANK, CTCArguments, greedy_decode, unit_of
from w2v2.finetune.trainer import FineTuner
from w2v2.model.config import load_config
from w2v2.model.feature_encoder import hide_padding
from w2v2.model.loading import load_with_head

BLANK_LOSS = 2.0  # a character's loss: a model that writes blanks alone cannot be far below it
BLANK_CAUSES = (
    "a low --learning_rate, many --freeze_encoder_steps, heavy masks for a small model (--mask_time_prob, "
    "--mask_feature_prob), random weights, or transcripts of other audio"
)


def build_recogniser(
    config: Wav2Vec2Config, vocabulary: dict[str, int], model_name_or_path: str | None, text_args: CTCArguments
) -> Wav2Vec2ForCTC:
    """Pretrained (or random) weights under a new layer with an output for each entry of the vocabulary.

    An utterance's output does not depend on its neighbours in the batch.
    """
    config.update(
        dict(vocab_size=len(vocabulary), pad_token_id=vocabulary[BLANK], bos_token_id=None, eos_token_id=None)
    )
    config.ctc_zero_infinity, config.ctc_loss_reduction = text_args.ctc_zero_infinity, text_args.ctc_loss_reduction
    return hide_padding(load_with_head(Wav2Vec2ForCTC, model_name_or_path, config, head=("lm_head",)))


def load_recogniser(source: str, vocabulary: dict[str, int]) -> Wav2Vec2ForCTC:
    """A fine-tuned model. Raises UserError where its outputs or its blank are not those of its vocabulary."""
    config = load_config(source, None)
    found, expected = (config.vocab_size, config.pad_token_id), (len(vocabulary), vocabulary[BLANK])
    if found != expected:
        raise UserError(f"--model_name_or_path {source}: vocab.json has {expected[0]} entries, the blank at {expected[1]}, "
                        f"but config.json {found[0]} outputs, the blank at {found[1]}: not of one model")  # fmt: skip
    return hide_padding(load_with_head(Wav2Vec2ForCTC, source, config, head=()))


class CTCTrainer(FineTuner):
    """Scores by greedy decoding: `predict` gives texts, and metrics hold WER and CER (PER for tokens).

    While `decoder` is set, `predict` searches with it too: `beam_texts` then holds the texts of each of its settings,
    lists of strings in the data set's order, None where the audio was unreadable.
    """

    def __init__(self, *args, vocabulary: dict[str, int], blank_warning_steps: int = 1_000, **kwargs):
        super().__init__(*args, **kwargs)
        self.vocabulary = vocabulary
        self.decoder: BeamDecoder | None = None
        self.beam_texts: list[list[str | None]] = []
        self.blanks = WatchBlanks(blank_warning_steps)
        self.add_callback(self.blanks)

    def loss_weight(self, inputs: dict[str, torch.Tensor]) -> float:
        """As many as the loss is summed over, or, for a mean over utterances, these; see `FineTuner.training_step`."""
        if self.model.config.ctc_loss_reduction == "mean":
            return super().loss_weight(inputs)
        return float((inputs["labels"] >= 0).sum())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss. With `batch_seconds` a sum over labels becomes their mean, as `loss_weight` expects."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.args.batch_seconds and self.model.config.ctc_loss_reduction == "sum":
            loss = loss / (inputs["labels"] >= 0).sum().clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, best path (B, T) with -1 past each utterance's end, and labels (B, U); a decoder adds words (B, W, K).

        The loss is the mean over utterances of the loss a label: the batch size does not move it.
        """
        config = self.model.config
        reduction, config.ctc_loss_reduction = config.ctc_loss_reduction, "mean"
        try:
            loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)  # logits (B, T, V)
        finally:
            config.ctc_loss_reduction = reduction
        num_frames = torch.full((len(logits),), logits.shape[1], device=logits.device)  # (B,)
        if "attention_mask" in inputs:
            num_samples = inputs["attention_mask"].sum(-1).to(logits.device)
            num_frames = self.model._get_feat_extract_output_lengths(num_samples)
        # (T,) >= (B, 1) -> (B, T)
        past_end = torch.arange(logits.shape[1], device=logits.device) >= num_frames[:, None]
        best_path = logits.argmax(-1).masked_fill(past_end, -1)
        if self.decoder is None:
            return loss, best_path, labels
        log_probs = logits.float().log_softmax(-1).cpu().numpy()
        words = self.decoder.stack(
            [self.decoder(row[:n]) for row, n in zip(log_probs, num_frames.tolist(), strict=True)]
        )
        return loss, (best_path, torch.from_numpy(words).to(best_path.device)), labels

    def score_output(self, output: EvalLoopOutput, data: SpeechDataset) -> tuple[list[str | None], dict[str, Any]]:
        """Texts, None where the audio was unreadable, and their rates. A set without any transcript gets no rates."""
        paths, words = output.predictions if self.decoder is not None else (output.predictions, None)
        readable = (output.label_ids >= 0).any(1)  # (N, U) -> (N,), N utterances of the set
        texts = [greedy_decode(path, self.vocabulary) if ok else None for path, ok in zip(paths, readable, strict=True)]
        if words is not None:
            self.beam_texts = [
                [self.decoder.text(row[:, k]) if ok else None for row, ok in zip(words, readable, strict=True)]
                for k in range(words.shape[2])
            ]
        known = [text for text in texts if text is not None]
        empty_fraction = sum(not text for text in known) / max(1, len(known))
        counts = {"utterances": len(known), "empty_fraction": empty_fraction}
        return texts, self.rates(data.table["text"][:], texts) | counts

    def rates(self, references: list[str], hypotheses: list[str | None]) -> dict[str, float]:
        """Error rates of the utterances that have a hypothesis; none for a set without references."""
        pairs = [pair for pair in zip(references, hypotheses, strict=True) if pair[1] is not None]
        if not any(reference for reference, _ in pairs):
            return {}
        return error_rates(*zip(*pairs, strict=True), unit_of(self.vocabulary))


class WatchBlanks(TrainerCallback):
    """Warns where a model still writes nothing but blanks `patience` updates after its encoder began to learn."""

    def __init__(self, patience: int):
        self.patience = patience
        self.warnings: list[str] = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        is_due = self.patience and state.global_step >= args.freeze_encoder_steps + self.patience
        loss = metrics.get("eval_loss", 0.0)
        # A model that writes nothing below this loss has learnt something: it is not on this plateau.
        if is_due and metrics.get("eval_empty_fraction", 0.0) >= 1.0 and loss >= BLANK_LOSS:
            warning = f"update {state.global_step}: nothing but blanks, validation loss {loss:.2f}: {BLANK_CAUSES}"
            self.warnings.append(warning)
            args.print_once(f"     warning: {warning}")

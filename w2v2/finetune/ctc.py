"""A recogniser: `Wav2Vec2ForCTC`, and `FineTuner` with error rates that the batch size does not move, beam search, a watch over blanks.

Shapes: B utterances, T latent frames, U units of a transcript, V entries of the vocabulary, W words of a hypothesis, K settings of the
decoder.
"""

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.trainer_utils import EvalLoopOutput

from w2v2.errors import UserError
from w2v2.evaluate.error_rates import error_rates
from w2v2.finetune.ctc_data import check_decoded
from w2v2.finetune.decoding import BeamDecoder
from w2v2.finetune.task_arguments import CTCArguments
from w2v2.finetune.text import BLANK, greedy_decode, unit_of
from w2v2.finetune.trainer import FineTuner
from w2v2.model.config import load_config
from w2v2.model.feature_encoder import hide_padding
from w2v2.model.loading import load_with_head

BLANK_LOSS = 2.0  # a character's loss: a model that writes blanks alone cannot be far below it


def build_recogniser(
    config: Wav2Vec2Config, vocabulary: dict[str, int], model_name_or_path: str | None, text_args: CTCArguments
) -> Wav2Vec2ForCTC:
    """Pretrained (or random) weights under a new layer with an output for each entry of the vocabulary.

    An utterance's output does not depend on its neighbours in the batch.
    """
    config.update({
        "vocab_size": len(vocabulary),
        "pad_token_id": vocabulary[BLANK],
        "bos_token_id": None,
        "eos_token_id": None,
        "ctc_zero_infinity": text_args.ctc_zero_infinity,
        "ctc_loss_reduction": text_args.ctc_loss_reduction,
    })  # fmt: skip
    return hide_padding(load_with_head(Wav2Vec2ForCTC, model_name_or_path, config, head=("lm_head",)))


def load_recogniser(source: str, vocabulary: dict[str, int]) -> Wav2Vec2ForCTC:
    """A fine-tuned model. Raises UserError where its outputs or its blank are not those of its vocabulary."""
    config = load_config(source, None)
    if config.vocab_size != len(vocabulary) or config.pad_token_id != vocabulary[BLANK]:
        raise UserError(
            f"--model_name_or_path {source}: vocab.json has {len(vocabulary)} entries with the blank at {vocabulary[BLANK]}, config.json "
            f"{config.vocab_size} outputs with the blank at {config.pad_token_id}: not of one model"
        )
    return hide_padding(load_with_head(Wav2Vec2ForCTC, source, config, head=()))


class CTCTrainer(FineTuner):
    """Scores by greedy decoding: `predict` gives texts, and metrics hold WER and CER (PER for tokens).

    While `decoder` is set, `predict` searches with it too: `beam_texts` then holds the texts of each of its settings, lists of
    strings in the data set's order, None where the audio was unreadable.
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
        """The model's loss; with `batch_seconds` a sum over labels is divided by their number, as `loss_weight` expects."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.args.batch_seconds and self.model.config.ctc_loss_reduction == "sum":
            loss = loss / (inputs["labels"] >= 0).sum().clamp_min(1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, best path (B, T) with -1 past each utterance's end, and labels (B, U); with a decoder, words (B, W, K) beside the path.

        The loss is the mean over utterances of the loss a label, whatever training minimises: the batch size does not move it.
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
        past_end = (
            torch.arange(logits.shape[1], device=logits.device) >= num_frames[:, None]
        )  # (T,) >= (B, 1) -> (B, T)
        best_path = logits.argmax(-1).masked_fill(past_end, -1)
        if self.decoder is None:
            return loss, best_path, labels
        log_probs = logits.float().log_softmax(-1).cpu().numpy()
        searched = [self.decoder(row[:n]) for row, n in zip(log_probs, num_frames.tolist(), strict=True)]
        words = self.decoder.stack(searched)
        return loss, (best_path, torch.from_numpy(words).to(best_path.device)), labels

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, prediction_loss_only=None, ignore_keys=None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """The stock loop; then `predictions` are texts, None where the audio was unreadable: those are not scored.

        A set without any transcript gets no rates.
        """
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        paths, words = output.predictions if self.decoder is not None else (output.predictions, None)
        readable = (output.label_ids >= 0).any(1)  # (N, U) -> (N,), N utterances of the set
        check_decoded(dataloader.dataset, readable, self.args.max_skipped_fraction)
        texts = [greedy_decode(path, self.vocabulary) if ok else None for path, ok in zip(paths, readable, strict=True)]
        if words is not None:
            self.beam_texts = [
                [self.decoder.text(row[:, k]) if ok else None for row, ok in zip(words, readable, strict=True)]
                for k in range(words.shape[2])
            ]
        known = [text for text in texts if text is not None]
        rates = self.rates(dataloader.dataset.table["text"][:], texts)
        rates |= {"utterances": len(known), "empty_fraction": sum(not text for text in known) / max(1, len(known))}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in rates.items()})
        return output._replace(predictions=texts)

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
        due = args.freeze_encoder_steps + self.patience
        if not self.patience or state.global_step < due or metrics.get("eval_empty_fraction", 0.0) < 1.0:
            return
        loss = metrics.get("eval_loss", float("nan"))
        if not loss >= BLANK_LOSS:  # it writes nothing, but has learnt something: not this plateau
            return
        causes = "; ".join(plateau_causes(args, state))
        self.warnings.append(f"update {state.global_step}: nothing but blanks, validation loss {loss:.2f}: {causes}")
        args.print_once(f"     warning: {self.warnings[-1]}")


def plateau_causes(args: Any, state: Any) -> list[str]:
    """Why a model may still be on the all-blank plateau, the three likeliest first."""
    rates = [entry["learning_rate"] for entry in state.log_history if "learning_rate" in entry]
    is_frozen_long = args.freeze_encoder_steps and state.global_step < 2 * args.freeze_encoder_steps
    causes = {
        f"the encoder was frozen for {args.freeze_encoder_steps} updates (--freeze_encoder_steps lower?)": is_frozen_long,
        f"the learning rate reached only {max(rates, default=0):.1e} so far (--learning_rate higher, shorter warm-up?)":
            rates and max(rates) < 2e-5,
        "masks may be too heavy for a small model (--mask_time_prob, --mask_feature_prob)":
            max(args.mask_time_prob, args.mask_feature_prob) > 0.3,
        "random weights leave it late, if at all": args.config_name,
        "small models and few labels take a few thousand updates": state.global_step < 3_000,
        "transcripts that do not belong to their audio, or weights that were not pretrained, never leave it": True,
    }  # fmt: skip
    return [cause for cause, is_likely in causes.items() if is_likely][:3]

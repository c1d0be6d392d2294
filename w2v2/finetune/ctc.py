"""A recogniser: `Wav2Vec2ForCTC`, its `Trainer` with error rates that the batch size does not move, and its scores.

Shapes: B utterances, T latent frames, U units of a transcript, V entries of the vocabulary, W words of a hypothesis,
K settings of the decoder.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.trainer_utils import EvalLoopOutput

from w2v2.errors import UserError
from w2v2.evaluate import scores
from w2v2.evaluate.scores import CHARACTERS, NAMES, RATES
from w2v2.finetune.arguments import PREDICTIONS_FILE, RESULTS_FILE, write_results
from w2v2.finetune.ctc_data import SpeechDataset
from w2v2.finetune.decoding import BeamDecoder, tuning_grid
from w2v2.finetune.subsets import draw_order, num_hours
from w2v2.finetune.text import BLANK, CTCArguments, greedy_decode, unit_of, unknown_units
from w2v2.finetune.trainer import FineTuner
from w2v2.model.feature_encoder import hide_padding
from w2v2.model.loading import load_config, load_with_head

BLANK_LOSS = 2.0  # a character's loss: a model that writes blanks alone cannot be far below it
BLANK_CAUSES = ("a low --learning_rate, many --freeze_encoder_steps, heavy masks for a small model (--mask_time_prob, "
                "--mask_feature_prob), random weights, or transcripts of other audio")  # fmt: skip


def build_recogniser(
    config: Wav2Vec2Config, vocabulary: dict[str, int], model_name_or_path: str | None, text_args: CTCArguments
) -> Wav2Vec2ForCTC:
    """Pretrained (or random) weights under a new layer; no utterance's output depends on its neighbours in the batch."""
    ids = dict(vocab_size=len(vocabulary), pad_token_id=vocabulary[BLANK], bos_token_id=None, eos_token_id=None)
    config.update(ids | {name: getattr(text_args, name) for name in ("ctc_zero_infinity", "ctc_loss_reduction")})
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

    While `decoder` is set, `predict` searches with it too: `beam_texts` holds the texts of each of its settings.
    Texts are in the data set's order, None where the audio was unreadable.
    """

    tie_breakers = ("cer", "wer")

    def __init__(self, *args, vocabulary: dict[str, int], blank_warning_steps: int = 1_000, **kwargs):
        super().__init__(*args, **kwargs)
        self.vocabulary, self.blank_warning_steps = vocabulary, blank_warning_steps
        self.decoder: BeamDecoder | None = None
        self.beam_texts: list[list[str | None]] = []
        self.warnings: list[str] = []

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
        found = [self.decoder(row[:n]) for row, n in zip(log_probs, num_frames, strict=True)]
        words = [torch.tensor([*ids, -1], device=logits.device) for settings in found for ids in settings]
        words = pad_sequence(words, batch_first=True, padding_value=-1)  # (B · K, W)
        words = words.view(len(logits), -1, words.shape[1]).transpose(1, 2)  # -> (B, K, W) -> (B, W, K)
        return loss, (best_path, words.contiguous()), labels

    def score_output(self, output: EvalLoopOutput, data: SpeechDataset) -> tuple[list[str | None], dict[str, Any]]:
        """Texts, None where the audio was unreadable, and their rates. A set without any transcript gets no rates."""
        paths, words = output.predictions if self.decoder is not None else (output.predictions, None)
        readable = (output.label_ids >= 0).any(1)  # (N, U) -> (N,), N utterances of the set
        texts = [greedy_decode(path, self.vocabulary) if ok else None for path, ok in zip(paths, readable, strict=True)]
        if words is not None:  # (N, W, K)
            self.beam_texts = [
                [self.decoder.text(row) if ok else None for row, ok in zip(words[..., k], readable, strict=True)]
                for k in range(words.shape[2])
            ]
        num_known = int(readable.sum())
        counts = {"utterances": num_known, "empty_fraction": texts.count("") / max(1, num_known)}
        return texts, self.rates(data.table["text"][:], texts) | counts

    def rates(self, references: list[str], hypotheses: list[str | None]) -> dict[str, float]:
        """Error rates of the utterances that have a hypothesis; none for a set without references."""
        pairs = [pair for pair in zip(references, hypotheses, strict=True) if pair[1] is not None]
        if not any(reference for reference, _ in pairs):
            return {}
        return scores.error_rates(*zip(*pairs, strict=True), unit_of(self.vocabulary))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The stock validation. Warns of a model that still writes blanks alone, long after its encoder began to learn."""
        metrics = super().evaluate(*args, **kwargs)
        patience, step, loss = self.blank_warning_steps, self.state.global_step, metrics["eval_loss"]
        is_due = patience and step >= self.args.freeze_encoder_steps + patience
        # A model that writes nothing below this loss has learnt something: it is not on this plateau.
        if is_due and metrics["eval_empty_fraction"] >= 1.0 and loss >= BLANK_LOSS:
            self.warnings += [f"update {step}: nothing but blanks, validation loss {loss:.2f}: {BLANK_CAUSES}"]
            self.args.print_once(f"     warning: {self.warnings[-1]}")
        return metrics


def describe_units(sets: dict[str, SpeechDataset], trainer: CTCTrainer) -> None:
    """What the model can write, and a warning for each set with units that it cannot."""
    unit, say = unit_of(trainer.vocabulary), trainer.args.print_once
    listed = ("" if unit == CHARACTERS else " ").join(t for t in trainer.vocabulary if not t.startswith("<"))
    say(f"  vocabulary: {len(trainer.vocabulary)}: {listed}")
    for name, data in sets.items():
        if unknown := unknown_units(data.table["text"], trainer.vocabulary):
            listed = ", ".join(f"{token!r} × {count}" for token, count in list(unknown.items())[:10])
            say(f"     warning: {name} has {sum(unknown.values())} {unit} that the vocabulary lacks: {listed}")


def score(
    trainer: CTCTrainer, sets: dict[str, SpeechDataset], decoder: BeamDecoder | None, text_args: CTCArguments
) -> None:
    """Score each set with the model as it is now, and write and print the results; the beam search is tuned first."""
    trainer.decoder, unit = decoder, unit_of(trainer.vocabulary)
    tuned = tune_decoder(trainer, sets["validation"], text_args) if text_args.tune_lm else {}
    scored = {name: score_set(trainer, name, data) for name, data in sets.items()}
    if not trainer.is_world_process_zero():
        return

    results, say = {name: result for name, (result, _) in scored.items()}, trainer.args.print_once
    run = trainer.summary() | {"target_unit": unit, "vocabulary_size": len(trainer.vocabulary)}
    unknown = {name: result[f"unknown_{unit}"]["counts"] for name, result in results.items() if "loss" in result}
    run[f"unknown_{unit}"] = {name: counts for name, counts in unknown.items() if counts}
    if is_trained := trainer.train_dataset is not None:
        run["warnings"] = trainer.warnings
    if decoder is not None:
        lm = {"path": decoder.lm_path, "beam_size": decoder.beam_size, "words": len(decoder.words)}
        run["lm"] = lm | decoder.settings[0]._asdict() | tuned
    lines = [line for _, lines in scored.values() for line in lines]
    write_results(trainer.args.output_dir, results | {"run": run}, lines)
    for name, result in results.items():
        say(f"{name:>12}: {_describe_result(result, unit)}")
    best = f"        best: update {trainer.best_update}; " if trainer.best_update else ""
    say(f"{best}{'model and ' if is_trained else ''}{RESULTS_FILE} in {trainer.args.output_dir}")


def tune_decoder(trainer: CTCTrainer, data: SpeechDataset, text_args: CTCArguments) -> dict[str, Any]:
    """Search some utterances with every setting of a small grid, and go on with the best. Returns the error rates."""
    unit = unit_of(trainer.vocabulary)
    grid, name = tuning_grid(unit), RATES[unit][0]
    some = copy.copy(data)
    some.table = data.table.select(sorted(draw_order(data.table, text_args.subset_seed)[: text_args.tune_utterances]))
    trainer.decoder.use(grid)
    trainer.predict(some, metric_key_prefix="tuning")
    rates = [trainer.rates(some.table["text"][:], texts)[name] for texts in trainer.beam_texts]
    best = rates.index(min(rates))
    trainer.decoder.use([grid[best]])
    chosen = ", ".join(f"{flag} {value}" for flag, value in grid[best]._asdict().items())
    trainer.args.print_once(
        f"      tuning: {chosen}: {NAMES[name]} {rates[best]:.1%} on {len(some)} validation utterances"
    )
    listed = [setting._asdict() | {name: round(rate, 5)} for setting, rate in zip(grid, rates, strict=True)]
    return {"tuned_on": len(some), "grid": listed}


def score_set(trainer: CTCTrainer, name: str, data: SpeechDataset) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `results.json` says of a set, and its lines for `predictions.jsonl`; unreadable audio has none."""
    output = trainer.predict(data, metric_key_prefix=name)
    hypotheses = {"": output.predictions} | ({"lm_": trainer.beam_texts[0]} if trainer.decoder is not None else {})
    unit = unit_of(trainer.vocabulary)
    rate = RATES[unit][0]
    is_scored = f"{name}_{rate}" in output.metrics  # not without transcripts
    lines = []
    for row, *texts in zip(data.table, *hypotheses.values(), strict=True):
        if texts[0] is None:
            continue
        line = {"set": name, "id": row["id"], "reference": row["text"] if is_scored else None}
        for prefix, text in zip(hypotheses, texts, strict=True):
            line[f"{prefix}hypothesis"] = text
            line |= {f"{prefix}{rate}": scores.word_error_rate(row["text"], text)} if is_scored else {}
        lines.append(line)
    result: dict[str, Any] = {"utterances": len(lines), "hours": round(num_hours(data.table), 4)}
    if not is_scored:
        return result, lines
    unknown = unknown_units(data.table["text"], trainer.vocabulary)
    result |= {key: output.metrics[f"{name}_{key}"] for key in (*RATES[unit], "loss")}
    pairs = ([line[key] for line in lines] for key in ("reference", "hypothesis"))
    result["edits"] = scores.count_edits(*pairs)
    result[f"unknown_{unit}"] = {"total": sum(unknown.values()), "counts": unknown}
    result["worst_utterances"] = scores.worst_utterances(lines, rate)
    if trainer.decoder is not None:
        rates = trainer.rates(data.table["text"][:], hypotheses["lm_"])
        result["lm"] = rates | {"worst_utterances": scores.worst_utterances(lines, f"lm_{rate}")}
    return result, lines


def _describe_result(result: Mapping[str, Any], unit: str) -> str:
    if "loss" not in result:
        return f"{result['utterances']} utterances transcribed in {PREDICTIONS_FILE}"
    greedy, beam = (", ".join(f"{NAMES[name]} {rates[name]:.1%}" for name in RATES[unit] if name in rates)
                    for rates in (result, result.get("lm", {})))  # fmt: skip
    return greedy + (f"; with the language model {beam}" if beam else "") + f" over {result['utterances']} utterances"

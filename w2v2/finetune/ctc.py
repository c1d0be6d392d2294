"""A recogniser: `Wav2Vec2ForCTC`, and its `Trainer` with error rates that the batch size does not move.

Shapes: B utterances, S samples, T latent frames, U units of a transcript, V entries of the vocabulary, W words of a
hypothesis, K settings of the decoder.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC
from transformers.trainer_utils import EvalLoopOutput

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.evaluate.scores import RATES, error_rates
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.beam_search import BeamDecoder
from w2v2.finetune.ctc_data import SpeechDataset
from w2v2.finetune.normalisation import describe_unit, lacks_spaces
from w2v2.finetune.text import BLANK, CTCArguments, align_path, join_units, read_vocabulary, unit_of
from w2v2.finetune.trainer import FineTuner
from w2v2.model.feature_encoder import hide_padding, min_samples, num_frames
from w2v2.model.loading import load_config, load_with_head

OVERLAP_SECONDS = 4.0  # of two neighbouring chunks: the frames of one half are taken from each
BLANK_LOSS = 2.0  # a character's loss: a model that writes blanks alone cannot be far below it
BLANK_CAUSES = ("a --learning_rate too low, or for a small model too high or too soon (--warmup_steps); many "
                "--freeze_encoder_steps, heavy masks (--mask_time_prob, --mask_feature_prob), random weights, or "
                "transcripts of other audio")  # fmt: skip


def read_head(config: Wav2Vec2Config, args: FineTuningArguments) -> dict[str, int] | None:
    """The vocabulary of the model to start from, where that was fine-tuned for recognition."""
    if not args.model_name_or_path or "Wav2Vec2ForCTC" not in (config.architectures or []):
        return None
    try:
        vocabulary = read_vocabulary(args.model_name_or_path)
    except UserError as error:
        args.print_once(f"        head: new ({error})")
        return None
    if (found := config.vocab_size) == len(vocabulary):
        return vocabulary
    args.print_once(f"        head: new, as config.json of {args.model_name_or_path} has {found} outputs, and vocab.json "
                    f"{len(vocabulary)} entries")  # fmt: skip


def keep_head(theirs: dict[str, int], vocabulary: dict[str, int], args: FineTuningArguments) -> bool:
    """Whether the model to start from writes all that this run's has to, so that its head stays."""
    missing = sorted(set(vocabulary) - set(theirs))
    is_kept = not missing and unit_of(theirs) == unit_of(vocabulary)
    lacking = f", without {', '.join(map(describe_unit, missing[:10]))}" if missing else ""
    what = (
        "kept from {}, whose vocabulary spells this text" if is_kept else "new, for {} has another vocabulary" + lacking
    )
    args.print_once(f"        head: {what.format(args.model_name_or_path)}")
    return is_kept


def build_recogniser(
    config: Wav2Vec2Config, vocabulary: dict[str, int], model_name_or_path: str | None, text_args: CTCArguments,
    is_new: bool = True,
) -> Wav2Vec2ForCTC:  # fmt: skip
    """Pretrained (or random) weights under a layer that is new or kept; padding does not move an utterance's output.

    Without `initial_blank_probability` some seeds of a small model take the word boundary for silence. Utterances of one
    word then cost a hundred nats a character, and hold all learning up.
    """
    ids = dict(vocab_size=len(vocabulary), pad_token_id=vocabulary[BLANK], bos_token_id=None, eos_token_id=None)
    config.update(ids | {name: getattr(text_args, name) for name in ("ctc_zero_infinity", "ctc_loss_reduction")})
    model = load_with_head(Wav2Vec2ForCTC, model_name_or_path, config, head=("lm_head",) if is_new else ())
    if is_new and (p := text_args.initial_blank_probability):
        with torch.no_grad():
            model.lm_head.bias[vocabulary[BLANK]] = math.log(p / (1 - p) * (len(vocabulary) - 1))
    return hide_padding(model)


def load_recogniser(source: str, vocabulary: dict[str, int]) -> Wav2Vec2ForCTC:
    """A fine-tuned model. Raises UserError where its outputs or its blank are not those of its vocabulary."""
    config = load_config(source, None)
    found, expected = (config.vocab_size, config.pad_token_id), (len(vocabulary), vocabulary[BLANK])
    if found != expected:
        raise UserError(f"--model_name_or_path {source}: vocab.json has {expected[0]} entries, the blank at {expected[1]}, "
                        f"but config.json {found[0]} outputs, the blank at {found[1]}: they are not of one model; fetch or make the folder again")  # fmt: skip
    return hide_padding(load_with_head(Wav2Vec2ForCTC, source, config, head=()))


class Chunk(NamedTuple):
    """Samples that go through the model, and which of their frames count."""

    samples: slice
    frames: slice


def cut_chunks(config: Wav2Vec2Config, num_samples: int, chunk_seconds: float) -> list[Chunk]:
    """Overlapping chunks whose frames that count are those of the whole recording, each once and in order."""
    stride, total = config.inputs_to_logits_ratio, num_frames(config, num_samples)
    if num_samples <= chunk_seconds * SAMPLING_RATE:
        return [Chunk(slice(0, num_samples), slice(0, total))]
    margin = round(OVERLAP_SECONDS / 2 * SAMPLING_RATE / stride)
    step = round(chunk_seconds * SAMPLING_RATE / stride) - 2 * margin
    chunks = []
    for first in range(0, total, step):
        start, end = max(0, first - margin), min(total, first + step + margin)
        samples = slice(start * stride, (end - 1) * stride + min_samples(config))
        chunks.append(Chunk(samples, slice(first - start, min(first + step, total) - start)))
    return chunks


def chunk_logits(model, samples: torch.Tensor, chunk_seconds: float, batch_size: int) -> torch.Tensor:
    """Logits (T, V) of a recording (S,) of any length."""
    logits, chunks = [], cut_chunks(model.config, len(samples), chunk_seconds)
    for i in range(0, len(chunks), batch_size):
        some = chunks[i : i + batch_size]
        pieces = [samples[chunk.samples] for chunk in some]
        values = pad_sequence(pieces, batch_first=True)  # (B, S)
        mask = pad_sequence([torch.ones_like(piece, dtype=torch.long) for piece in pieces], batch_first=True)
        found = model(values, attention_mask=mask if mask.min() == 0 else None).logits  # (B, T, V)
        logits += [row[chunk.frames].float() for row, chunk in zip(found, some, strict=True)]
    return torch.cat(logits)


def ctc_losses(
    logits: torch.Tensor, num_frames: torch.Tensor, labels: torch.Tensor, config: Wav2Vec2Config
) -> torch.Tensor:
    """Loss a label of each utterance (B,), as the stock model takes it: logits (B, T, V), labels (B, U)."""
    if not len(logits):
        return logits.new_zeros(0)
    log_probs, num_labels = logits.float().log_softmax(-1).transpose(0, 1), (labels >= 0).sum(-1)  # (T, B, V), (B,)
    options = dict(blank=config.pad_token_id, reduction="none", zero_infinity=config.ctc_zero_infinity)
    with torch.backends.cudnn.flags(enabled=False):
        losses = F.ctc_loss(log_probs, labels.clamp_min(0), num_frames, num_labels, **options)
    return losses / num_labels


class CTCTrainer(FineTuner):
    """Scores by greedy decoding: `predict` gives texts, and metrics hold WER and CER (PER for tokens).

    While `decoder` is set, `predict` searches with it too: `beam_texts` holds the texts of each of its settings.
    `units` are those of the best path with their frames. Texts are in the data set's order, None where the audio was
    unreadable. Recordings longer than `chunk_seconds` go through the model in overlapping chunks.
    """

    tie_breakers = ("cer", "wer")

    def __init__(
        self, *args, vocabulary: dict[str, int], chunk_seconds: float = math.inf, blank_warning_steps: int = 1_000, **kwargs
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.vocabulary, self.chunk_seconds, self.blank_warning_steps = vocabulary, chunk_seconds, blank_warning_steps
        self.measure = self.measure or self._choose_measure()
        self.decoder: BeamDecoder | None = None
        self.beam_texts: list[list[str | None]] = []
        self.units: list[list[tuple[str, int, int]]] = []
        self.warnings: list[str] = []

    def _choose_measure(self) -> str:
        """By default the first error rate, but that of characters where the text has no spaces between words."""
        measure, train = RATES[unit_of(self.vocabulary)][0], self.train_dataset
        if measure == "wer" and train is not None and lacks_spaces(train.table["text"]):
            self.args.print_once(
                "     measure: the lowest CER is the best, because the text has no spaces between words"
            )
            return "cer"
        return measure

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
        """Losses, best path (B, T) with -1 past each utterance's end, and labels (B, U); a decoder adds words (B, W, K).

        The losses a label are of the utterances that have one: it is neither unreadable nor longer than `chunk_seconds`.
        """
        inputs = self._prepare_inputs(inputs)
        values, mask, labels = inputs["input_values"], inputs.get("attention_mask"), inputs["labels"]
        num_samples = mask.sum(-1) if mask is not None else torch.full((len(values),), values.shape[1])
        is_long = (num_samples > self.chunk_seconds * SAMPLING_RATE).to(values.device)  # (B,)
        with torch.no_grad(), self.compute_loss_context_manager():
            if is_long.any():
                size = max(1, int(self.args.eval_micro_batch_seconds // self.chunk_seconds))
                rows = zip(values, num_samples, strict=True)
                logits = pad_sequence([chunk_logits(model, row[:n], self.chunk_seconds, size) for row, n in rows], True)
            else:
                logits = model(values, attention_mask=mask).logits  # (B, T, V)
        num_frames = self.model._get_feat_extract_output_lengths(num_samples.to(logits.device))  # (B,)
        # (T,) >= (B, 1) -> (B, T)
        past_end = torch.arange(logits.shape[1], device=logits.device) >= num_frames[:, None]
        best_path = logits.argmax(-1).masked_fill(past_end, -1)
        has_loss = (labels >= 0).any(-1) & ~is_long
        loss = ctc_losses(logits[has_loss], num_frames[has_loss], labels[has_loss], self.model.config)
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
        readable = [bool((labels >= 0).any()) for labels in output.label_ids]  # (N,), N utterances of the set
        self.units = [align_path(path, self.vocabulary) for path in paths]
        texts = [join_units(units, unit_of(self.vocabulary)) if ok else None
                 for units, ok in zip(self.units, readable, strict=True)]  # fmt: skip
        if words is not None:  # N times (W, K)
            self.beam_texts = [
                [self.decoder.text(row[:, k]) if ok else None for row, ok in zip(words, readable, strict=True)]
                for k in range(len(self.decoder.settings))
            ]
        num_known = sum(readable)
        counts = {"utterances": num_known, "empty_fraction": texts.count("") / max(1, num_known)}
        return texts, self.rates(data.table["text"][:], texts) | counts

    def rates(self, references: list[str], hypotheses: list[str | None]) -> dict[str, float]:
        """Error rates of the utterances that have a hypothesis; none for a set without references."""
        pairs = [pair for pair in zip(references, hypotheses, strict=True) if pair[1] is not None]
        if not any(reference for reference, _ in pairs):
            return {}
        return error_rates(*zip(*pairs, strict=True), unit_of(self.vocabulary))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The stock validation. Warns of a model that still writes blanks alone, long after its encoder began to learn."""
        metrics = super().evaluate(*args, **kwargs)
        patience, step, loss = self.blank_warning_steps, self.state.global_step, metrics["eval_loss"]
        is_due = patience and step >= self.args.freeze_encoder_steps + patience
        # A model that writes nothing below this loss has learnt something: it is not on this plateau.
        if is_due and metrics["eval_empty_fraction"] >= 1.0 and not loss < BLANK_LOSS:  # NaN: none is known
            self.warnings += [f"update {step}: nothing but blanks, validation loss {loss:.2f}: {BLANK_CAUSES}"]
            self.args.print_once(f"     warning: {self.warnings[-1]}")
        return metrics

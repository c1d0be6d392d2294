"""What a frozen wav2vec 2.0 makes of utterances: every layer's frames, or their mean, or a classifier's pooled projection.

Layer 0 is what the transformer is fed, layer i the output of its i-th block (as `output_hidden_states` of the stock model counts).
An utterance's features are those that it has alone: padding is seen by nothing.

Shapes: N utterances, B of a batch, T latent frames, L layers (with layer 0), D width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

from w2v2.data.audio import SAMPLING_RATE, AudioError, read_crop
from w2v2.errors import UserError
from w2v2.finetune.classification import HEAD
from w2v2.model.config import load_config, locate
from w2v2.model.feature_encoder import hide_padding, min_samples
from w2v2.model.loading import load_feature_extractor, load_with_head

BATCH_SECONDS = 60.0  # padding included


class FrozenModel:
    """A wav2vec 2.0 that is only listened to: pretrained, fine-tuned, or of random weights (where `source` is None)."""

    def __init__(self, source: str | None, config_name: str | None = None, *, seed: int = 0, device: str = "cpu"):
        torch.manual_seed(seed)  # of random weights
        config = load_config(source, config_name)
        self.has_head = (
            source is not None and (config.architectures or [None])[0] == "Wav2Vec2ForSequenceClassification"
        )
        model = load_with_head(Wav2Vec2ForSequenceClassification, source, config, HEAD)
        if self.has_head:  # what was loaded and checked, but with the head that it came with
            model = Wav2Vec2ForSequenceClassification.from_pretrained(
                locate(source), config=config, dtype=torch.float32
            )
        self.model = hide_padding(model).requires_grad_(False).eval().to(device)
        self.extractor: Wav2Vec2FeatureExtractor = load_feature_extractor(config.name_or_path, config)
        self.config, self.device = config, device
        self.num_layers = config.num_hidden_layers + 1

    def batches(self, table: Dataset) -> Iterator[tuple[list[int], dict[str, torch.Tensor], torch.Tensor]]:
        """Rows, inputs, and frames (B,) of each batch: utterances of like length, at most `BATCH_SECONDS` together, or one."""
        lengths = table["num_samples"]
        order = sorted(range(len(table)), key=lambda row: -lengths[row])
        while order:
            size = max(1, int(BATCH_SECONDS * SAMPLING_RATE / max(lengths[order[0]], 1)))
            rows, order = order[:size], order[size:]
            waveforms = [self._read(table[row]) for row in rows]
            num_samples = torch.tensor([len(waveform) for waveform in waveforms])
            values = torch.zeros(len(rows), int(num_samples.max()))
            for i, waveform in enumerate(waveforms):
                values[i, : len(waveform)] = torch.from_numpy(waveform)
            inputs = {"input_values": values.to(self.device)}
            if int(num_samples.min()) < values.shape[1]:
                inputs["attention_mask"] = (torch.arange(values.shape[1]) < num_samples[:, None]).long().to(self.device)
            yield rows, inputs, self.model._get_feat_extract_output_lengths(num_samples)

    def _read(self, utterance: dict) -> np.ndarray:
        try:
            samples = read_crop(utterance["audio"], round(utterance["start"] * SAMPLING_RATE), utterance["num_samples"])
        except AudioError as error:
            raise UserError(f"{error.path}: {error.reason}; mend it, or leave it out of the manifest") from None
        samples = np.pad(samples, (0, max(0, min_samples(self.config) - len(samples))))
        return np.asarray(self.extractor(samples, sampling_rate=SAMPLING_RATE).input_values[0], np.float32)

    @torch.no_grad()
    def frames(self, table: Dataset) -> Iterator[tuple[int, torch.Tensor]]:
        """Row and frames (L, T, D) of every utterance, longest first."""
        for rows, inputs, num_frames in self.batches(table):
            layers = torch.stack(
                self.model.wav2vec2(**inputs, output_hidden_states=True).hidden_states, 1
            )  # (B, L, T, D)
            for row, count, utterance in zip(rows, num_frames.tolist(), layers, strict=True):
                yield row, utterance[:, :count]

    def means(self, table: Dataset) -> np.ndarray:
        """Mean over time of every layer, (N, L, D)."""
        result = np.empty((len(table), self.num_layers, self.config.hidden_size), np.float32)
        for row, frames in self.frames(table):
            result[row] = frames.mean(1).cpu().numpy()
        return result

    @torch.no_grad()
    def embeddings(self, table: Dataset) -> np.ndarray:
        """The fine-tuned classifier's projection, averaged over time: what its last linear layer is given. Shape (N, width)."""
        found: list[torch.Tensor] = []
        handle = self.model.classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].cpu()))
        result = np.empty((len(table), self.config.classifier_proj_size), np.float32)
        try:
            for rows, inputs, _ in self.batches(table):
                self.model(**inputs)
                result[rows] = found.pop().numpy()
        finally:
            handle.remove()
        return result


def save_frames(model: FrozenModel, table: Dataset, folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames of all utterances in a 16-bit file a layer, mapped from the disk, (frames, D) each; and where utterances begin, (N + 1,).

    A second of speech takes 100 · D bytes a layer: an hour on BASE 3.6 GB in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = model.model._get_feat_extract_output_lengths(
        torch.tensor(table["num_samples"]).clamp(min=min_samples(model.config))
    )
    starts = np.concatenate([[0], np.cumsum(counts.numpy())])
    shape = (int(starts[-1]), model.config.hidden_size)
    layers = [
        np.lib.format.open_memmap(folder / f"layer{i}.npy", "w+", np.float16, shape) for i in range(model.num_layers)
    ]
    for row, frames in model.frames(table):
        for layer, values in zip(layers, frames.cpu().numpy(), strict=True):
            layer[starts[row] : starts[row + 1]] = values
    return layers, starts


def concatenate_tables(tables: Sequence[Dataset], columns: Sequence[str]) -> Dataset:
    """One table of these columns, rows in order."""
    rows = {column: [value for table in tables for value in table[column]] for column in columns}
    return Dataset.from_dict(rows)

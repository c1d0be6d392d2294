"""What a frozen wav2vec 2.0 makes of each utterance alone: frames of every layer, their means, or its embedding.

Layer 0 is what the transformer is fed, layer i the output of its i-th block.
Shapes: N utterances, B of a batch, S samples, T latent frames, L layers (with layer 0), D width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import Wav2Vec2ForSequenceClassification

from w2v2.audio.crops import SAMPLING_RATE, AudioError, read_crop
from w2v2.data.utterances import inspect_some
from w2v2.errors import UserError
from w2v2.finetune.batching import cut_evaluation
from w2v2.finetune.classifier import HEAD
from w2v2.finetune.ctc_data import collate_speech, read_utterances
from w2v2.manifests.dataset_loading import Manifest, name_sources
from w2v2.model.feature_encoder import hide_padding, min_samples
from w2v2.model.loading import load_config, load_feature_extractor, load_with_head
from w2v2.probe.arguments import FrozenArguments

BATCH_SECONDS = 60.0  # padding included


def read_table(paths: Sequence[Manifest], columns: Sequence[str], args: FrozenArguments) -> Dataset:
    """Utterances of these manifests whose audio opens, with these columns beside the usual ones."""
    table, skipped = read_utterances(paths, args, columns)
    if skipped:
        print(f"{name_sources(paths)}: {len(skipped)} utterances with unreadable audio are left out")
    inspect_some(table)  # warns of stereo whose sides cancel out
    return table


class FrozenModel:
    """A wav2vec 2.0 that is only listened to: pretrained, fine-tuned, or of random weights (where `source` is None)."""

    def __init__(self, source: str | None, config_name: str | None = None, *, seed: int = 0, device: str = "cpu"):
        torch.manual_seed(seed)  # of random weights
        config = load_config(source, config_name)
        self.has_head = source is not None and config.architectures == ["Wav2Vec2ForSequenceClassification"]
        head = () if self.has_head else HEAD  # a head that came with the weights is kept
        model = load_with_head(Wav2Vec2ForSequenceClassification, source, config, head)
        self.model = hide_padding(model).requires_grad_(False).eval().to(device)
        self.extractor = load_feature_extractor(config.name_or_path, config)
        self.config, self.device, self.num_layers = config, device, config.num_hidden_layers + 1

    def batches(self, table: Dataset) -> Iterator[tuple[list[int], dict[str, torch.Tensor], torch.Tensor]]:
        """Rows, inputs, and frames (B,) of each batch: utterances of like length, `BATCH_SECONDS` together, or one."""
        lengths = np.array(table["num_samples"])
        order = np.argsort(-lengths, kind="stable")
        for some in cut_evaluation(lengths[order], round(BATCH_SECONDS * SAMPLING_RATE), len(order)):
            rows = order[list(some)].tolist()
            items = [{"input_values": self._read_waveform(table[row]), "labels": []} for row in rows]
            inputs = {name: x.to(self.device) for name, x in collate_speech(items).items() if name != "labels"}
            num_samples_B = torch.tensor([len(item["input_values"]) for item in items])
            yield rows, inputs, self.model._get_feat_extract_output_lengths(num_samples_B)

    def _read_waveform(self, utterance: dict) -> np.ndarray:
        """Samples (S,) as the model takes them, at least enough for one latent frame."""
        try:
            start, channel = round(utterance["start"] * SAMPLING_RATE), utterance.get("channel")
            samples = read_crop(utterance["audio"], start, utterance["num_samples"], channel)
        except AudioError as error:
            raise UserError(f"{error.path}: {error.reason}; mend it, or leave it out of the manifest") from None
        samples = np.pad(samples, (0, max(0, min_samples(self.config) - len(samples))))
        return np.asarray(self.extractor(samples, sampling_rate=SAMPLING_RATE).input_values[0], np.float32)

    @torch.no_grad()
    def frames(self, table: Dataset) -> Iterator[tuple[int, torch.Tensor]]:
        """Row and frames (L, T, D) of every utterance, longest first."""
        for rows, inputs, num_frames_B in self.batches(table):
            hidden = self.model.wav2vec2(**inputs, output_hidden_states=True).hidden_states  # L × (B, T, D)
            for row, num_frames, layers in zip(rows, num_frames_B.tolist(), torch.stack(hidden, 1), strict=True):
                yield row, layers[:, :num_frames]

    def means(self, table: Dataset) -> np.ndarray:
        """Mean over time of every layer, (N, L, D)."""
        result = np.empty((len(table), self.num_layers, self.config.hidden_size), np.float32)
        for row, frames in self.frames(table):
            result[row] = frames.mean(1).cpu().numpy()  # (L, T, D) -> (L, D)
        return result

    @torch.no_grad()
    def embeddings(self, table: Dataset) -> np.ndarray:
        """What a fine-tuned classifier's last layer is given: the projection averaged over time, (N, width)."""
        result = np.empty((len(table), self.config.classifier_proj_size), np.float32)
        classifier, self.model.classifier = self.model.classifier, torch.nn.Identity()
        for rows, inputs, _ in self.batches(table):
            result[rows] = self.model(**inputs).logits.cpu().numpy()
        self.model.classifier = classifier
        return result


def save_frames(model: FrozenModel, table: Dataset, folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames of all utterances, a 16-bit file a layer, (frames, D), and their starts (N + 1,). BASE: 3.6 GB an hour."""
    folder.mkdir(parents=True, exist_ok=True)
    num_samples_N = torch.tensor(table["num_samples"][:]).clamp(min=min_samples(model.config))
    num_frames_N = model.model._get_feat_extract_output_lengths(num_samples_N).numpy()
    starts = np.concatenate([[0], np.cumsum(num_frames_N)])
    shape = (int(starts[-1]), model.config.hidden_size)
    paths = [folder / f"layer{i}.npy" for i in range(model.num_layers)]
    layers = [np.lib.format.open_memmap(path, "w+", np.float16, shape) for path in paths]
    for row, frames in model.frames(table):
        for layer, values in zip(layers, frames.cpu().numpy(), strict=True):
            layer[starts[row] : starts[row + 1]] = values
    return layers, starts

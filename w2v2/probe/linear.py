"""Linear probes: how much of a label, or of the characters, a linear map reads from each layer of a frozen model.

A label is read from the mean over time, characters by a CTC head from each frame, both standardised by the training
utterances. Validation chooses the strength of the penalty, and the best layer; the test has no say in it.

Shapes: N utterances, L layers, T frames of one, U characters of one, D width, V entries of the vocabulary.
"""

import json
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.evaluate.scores import classification_scores, error_rates, mean_and_deviation
from w2v2.finetune.labels import Split
from w2v2.finetune.text import encode, greedy_decode
from w2v2.train.log import read_metrics

# Classifiers, and the strengths of their penalties; a C that is small and an alpha that is large hold back most.
CLASSIFIERS = {
    "logistic": (LogisticRegression(max_iter=500), {"logisticregression__C": [0.001, 0.01, 0.1, 1.0, 10.0]}),
    "ridge": (RidgeClassifier(), {"ridgeclassifier__alpha": [1e4, 1e3, 1e2, 1e1, 1.0]}),
}
SCORINGS = {"uar": "balanced_accuracy", "accuracy": "accuracy", "macro_f1": "f1_macro"}
VALIDATION_SHARE = 5  # one utterance in so many, where there is no validation set
BATCH_SIZE, LEARNING_RATE = 16, 0.01  # of a CTC head


def probe_layers(
    kind: str, features: np.ndarray, targets: Sequence[str], splits: Sequence[Split], measure: str
) -> list[dict[str, Any]]:
    """For each layer of `features` (N, L, D): test scores of all splits together, their spread, validation score."""
    targets, (classifier, strengths) = np.asarray(targets), CLASSIFIERS[kind]
    layers = []
    for layer in range(features.shape[1]):  # (N, L, D) -> (N, D)
        references, predictions, scores, validation, chosen = [], [], [], [], []
        for split in splits:
            both = split.train + split.validation
            folds = PredefinedSplit([-1] * len(split.train) + [0] * len(split.validation))  # -1 always trains
            model = make_pipeline(StandardScaler(), classifier)
            search = GridSearchCV(model, strengths, scoring=SCORINGS[measure], cv=folds, error_score="raise")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weak penalties that did not converge, which validation then judges
                search.fit(features[both, layer], targets[both])
            predicted = search.predict(features[split.test, layer])
            references += targets[split.test].tolist()
            predictions += predicted.tolist()
            scores.append(classification_scores(targets[split.test], predicted))
            validation.append(float(search.best_score_))
            chosen += search.best_params_.values()
        result = {"layer": layer, **classification_scores(references, predictions)}
        result |= mean_and_deviation(scores) if len(splits) > 1 else {}
        layers.append(result | {"validation": float(np.mean(validation)), "strengths": chosen})
    return layers


class FrameSet:
    """Frames of all utterances at one layer, (frames, D) on the disk, standardised by those of the `train` rows."""

    def __init__(self, frames: np.ndarray, starts: np.ndarray, train: Sequence[int]):
        self.frames, self.starts = frames, starts
        self.scaler = StandardScaler()
        for row in train:
            self.scaler.partial_fit(self._frames_of(row))

    def _frames_of(self, row: int) -> np.ndarray:  # (T, D); doubles, for sums over hours of them
        return self.frames[self.starts[row] : self.starts[row + 1]].astype(np.float64)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames (N, T, D), padded with zeros, and their numbers (N,)."""
        pieces = [torch.from_numpy(self.scaler.transform(self._frames_of(row))).float() for row in rows]
        return nn.utils.rnn.pad_sequence(pieces, batch_first=True), torch.tensor([len(piece) for piece in pieces])


@dataclass(frozen=True)
class CharacterProbe:
    """What is read, and how heads are trained: Adam on utterances drawn at random, a linear decay to zero."""

    texts: Sequence[str]
    vocabulary: dict[str, int]
    num_updates: int
    seed: int

    def probe_layers(self, layers: Sequence[np.ndarray], starts: np.ndarray, split: Split) -> list[dict[str, float]]:
        """For each layer the test's `cer` and `wer`, and `validation`, the validation utterances' CER; fractions."""
        results = []
        for number, frames in enumerate(layers):
            data = FrameSet(frames, starts, split.train)
            head = self.train_head(data, split.train)
            held = split.validation, split.test
            read = [self.transcribe(head, data, rows) for rows in held]
            validation, test = map(error_rates, ([self.texts[i] for i in rows] for rows in held), read)
            results.append({"layer": number, **test, "validation": validation["cer"]})
        return results

    def train_head(self, data: FrameSet, rows: Sequence[int]) -> nn.Linear:
        """A linear layer D → V, a function of the seed."""
        random = np.random.default_rng(self.seed)
        torch.manual_seed(self.seed)
        head = nn.Linear(data.frames.shape[1], len(self.vocabulary))
        optimizer = torch.optim.Adam(head.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.num_updates)
        labels = {row: torch.tensor(encode(self.texts[row], self.vocabulary)) for row in rows}  # (U,) each
        for _ in range(self.num_updates):
            chosen = random.choice(rows, min(BATCH_SIZE, len(rows)), replace=False)
            frames, num_frames_N = data.batch(chosen)
            log_probabilities = head(frames).log_softmax(-1).transpose(0, 1)  # (N, T, V) -> (T, N, V)
            written = [labels[row] for row in chosen.tolist()]
            num_labels_N = torch.tensor(list(map(len, written)))
            loss = F.ctc_loss(log_probabilities, torch.cat(written), num_frames_N, num_labels_N, zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return head

    @torch.no_grad()
    def transcribe(self, head: nn.Linear, data: FrameSet, rows: Sequence[int]) -> list[str]:
        """Greedy decoding of these utterances, in order."""
        texts = []
        for first in range(0, len(rows), BATCH_SIZE):
            frames, num_frames_N = data.batch(rows[first : first + BATCH_SIZE])
            paths = zip(head(frames).argmax(-1).tolist(), num_frames_N.tolist(), strict=True)  # (N, T, V) -> (N, T)
            texts += [greedy_decode(path[:num_frames], self.vocabulary) for path, num_frames in paths]
        return texts


def best_layer(layers: Sequence[dict[str, Any]], lower_is_better: bool = False) -> dict[str, Any]:
    """The layer that validated best; of equals the lowest."""
    return min(layers, key=lambda layer: layer["validation"] if lower_is_better else -layer["validation"])


def hold_out(ids: Sequence[str], targets: Sequence[str], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Training and validation rows: every fifth of a label's utterances validates, in an order by their ids alone."""
    order = pd.Series(sorted(rows, key=lambda row: (zlib.crc32(ids[row].encode()), ids[row])))
    rank = order.groupby([targets[row] for row in order]).cumcount() + 1
    held = order[rank % VALIDATION_SHARE == 0].tolist()
    return sorted(set(rows) - set(held)), sorted(held)


def heard_hours(folder: str) -> float | None:
    """Hours of audio that a checkpoint of pretraining had heard, by its state or its metrics; None without both."""
    state, log = Path(folder, "training_state", "state.json"), Path(folder, "metrics.jsonl")
    if state.exists():
        return json.loads(state.read_text(encoding="utf-8"))["heard_samples"] / SAMPLING_RATE / 3600
    records = read_metrics(log) if log.exists() else []
    return max((record["audio_hours"] for record in records if record.get("audio_hours")), default=None)


def format_table(results: Sequence[dict[str, Any]], measure: str) -> str:
    """Layers down, models across, the test score in each cell; the layer that validated best is starred."""
    columns = {}
    for result in results:
        scores = enumerate(layer[measure] for layer in result["layers"])
        columns[result["name"]] = pd.Series([f"{s:.1%}{'*' if i == result['best_layer'] else ' '}" for i, s in scores])
    return pd.DataFrame(columns).rename_axis(columns="layer").fillna("").to_string()

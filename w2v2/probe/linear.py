"""Linear probes: how much of a label a linear classifier reads from each layer of a frozen model.

Features (mean over time) are standardised by the training utterances. The strength of the penalty is chosen on the
validation utterances, then the probe is fitted once more on both. The best layer is the one that validated best; the
test has no say in it.

Shapes: N utterances, L layers, D width.
"""

import json
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from w2v2.data.audio import SAMPLING_RATE
from w2v2.evaluate.scores import classification_scores, mean_and_deviation
from w2v2.finetune.labels import Split
from w2v2.train.log import read_metrics

# Classifiers, and the strengths of their penalties; a C that is small and an alpha that is large hold back most.
CLASSIFIERS = {
    "logistic": (LogisticRegression(max_iter=500), {"logisticregression__C": [0.001, 0.01, 0.1, 1.0, 10.0]}),
    "ridge": (RidgeClassifier(), {"ridgeclassifier__alpha": [1e4, 1e3, 1e2, 1e1, 1.0]}),
}
_SCORINGS = {"uar": "balanced_accuracy", "accuracy": "accuracy", "macro_f1": "f1_macro"}
_VALIDATION_SHARE = 5  # one utterance in so many, where there is no validation set


def probe_layer(
    kind: str, features: np.ndarray, targets: np.ndarray, split: Split, measure: str
) -> tuple[np.ndarray, float, float]:
    """Predictions for the test rows (n,), the score of the best strength on the validation rows, and that strength.

    Of equal strengths the first is taken; the predictions are those of a fit to training and validation rows.
    """
    both = split.train + split.validation
    classifier, strengths = CLASSIFIERS[kind]
    folds = PredefinedSplit([-1] * len(split.train) + [0] * len(split.validation))  # -1 always trains
    search = GridSearchCV(
        make_pipeline(StandardScaler(), classifier),
        strengths,
        scoring=_SCORINGS[measure],
        cv=folds,
        error_score="raise",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weak penalties that did not converge, which validation then judges
        search.fit(features[both], targets[both])
    return search.predict(features[split.test]), float(search.best_score_), *search.best_params_.values()


def probe_layers(
    kind: str, features: np.ndarray, targets: Sequence[str], splits: Sequence[Split], measure: str
) -> list[dict[str, Any]]:
    """For each layer of `features` (N, L, D): test scores of all splits together, their spread, validation score."""
    targets = np.asarray(targets)
    layers = []
    for layer in range(features.shape[1]):  # (N, L, D) -> (N, D)
        references, predictions, scores, validation, strengths = [], [], [], [], []
        for split in splits:
            predicted, score, strength = probe_layer(kind, features[:, layer], targets, split, measure)
            references += targets[split.test].tolist()
            predictions += predicted.tolist()
            scores.append(classification_scores(targets[split.test], predicted))
            validation.append(score)
            strengths.append(strength)
        result = {"layer": layer, **classification_scores(references, predictions)}
        result |= mean_and_deviation(scores) if len(splits) > 1 else {}
        layers.append(result | {"validation": float(np.mean(validation)), "strengths": strengths})
    return layers


def best_layer(layers: Sequence[dict[str, Any]], lower_is_better: bool = False) -> dict[str, Any]:
    """The layer that validated best; of equals the lowest."""
    sign = -1 if lower_is_better else 1
    return max(layers, key=lambda layer: (sign * layer["validation"], -layer["layer"]))


def hold_out(ids: Sequence[str], targets: Sequence[str], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Training and validation rows: every fifth of a label's utterances validates, in an order by their ids alone."""
    by_label: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: (zlib.crc32(ids[row].encode()), ids[row])):
        by_label.setdefault(targets[row], []).append(row)
    held = [row for found in by_label.values() for row in found[_VALIDATION_SHARE - 1 :: _VALIDATION_SHARE]]
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

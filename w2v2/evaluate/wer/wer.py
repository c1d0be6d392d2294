"""Word error rate as a local `evaluate` module: `evaluate.load("w2v2/evaluation/wer")` needs no network.

WER = (substitutions + deletions + insertions) / words of the references, over the whole corpus, counted by jiwer. An empty
reference adds its hypothesis' words as insertions; references that are all empty have no WER and raise `ValueError`.
"""

import datasets
import evaluate
import jiwer


class Wer(evaluate.Metric):
    """Corpus WER of `predictions` (hypotheses) against `references`, a fraction (it can exceed 1)."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Word error rate over the whole corpus, counted by jiwer.",
            citation="",
            inputs_description="predictions and references: lists of transcripts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        if not any(reference.split() for reference in references):
            raise ValueError("all references are empty: there is no word error rate")
        return {"wer": jiwer.wer(references, predictions)}

"""Character error rate as a local `evaluate` module: `evaluate.load("w2v2/evaluation/cer")` needs no network.

CER = (substitutions + deletions + insertions) / characters of the references (spaces count), over the whole corpus, counted by
jiwer. An empty reference adds its hypothesis' characters as insertions; references that are all empty raise `ValueError`.
"""

import datasets
import evaluate
import jiwer


class Cer(evaluate.Metric):
    """Corpus CER of `predictions` (hypotheses) against `references`, a fraction (it can exceed 1)."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Character error rate over the whole corpus, counted by jiwer.",
            citation="",
            inputs_description="predictions and references: lists of transcripts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        if not any(reference.strip() for reference in references):
            raise ValueError("all references are empty: there is no character error rate")
        return {"cer": jiwer.cer(references, predictions)}

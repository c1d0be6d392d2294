"""Answers of a model and the truth → figures and pictures.

In: transcripts, labels, scores of pairs, logged metrics. Out: error rates, accuracy and recall, equal error rates, plots.
Read `scores` (recognition, classification, trials of speakers), then `plots`.
"""

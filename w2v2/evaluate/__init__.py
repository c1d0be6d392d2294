"""Answers of a model and the truth → figures and pictures.

In: transcripts, labels, or scores of pairs. Out: error rates, accuracy and recall, equal error rates, plots.
Read `error_rates` (recognition), `scores` (classification), `verification` (trials of speakers), then `plots`.
"""

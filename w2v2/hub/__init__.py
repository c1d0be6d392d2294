"""A trained folder → what others see of it: model card, curves, and a push to the Hugging Face Hub.

In: the output folder, its resolved flags, metrics and scores. Out: `README.md`, `plots/`, a repository on the Hub.
Read `card` (its text is in templates/; the curves are in `evaluate.plots`), then `push`.
"""

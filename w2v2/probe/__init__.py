"""A frozen model and labelled or transcribed utterances → how much of it each layer tells, without fine-tuning.

In: folders of weights, tables of utterances. Out: scores by layer (probe.py), embeddings (verify_speakers.py).
Read `arguments` (the flags), `features` (frames of every layer), then `linear` (labels and characters).
"""

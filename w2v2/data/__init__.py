"""Manifests and audio → the micro-batches of every update.

In: manifest files or folders, audio files of any rate. Out: `PretrainBatch`: waveforms at 16 kHz, mask spans,
distractors. Which audio: `readers`, `manifest`, `durations`, `utterances`. Its samples: `audio`. Which crops
make an update: `hashing`, `batching`, `cutting`. What a device gets: `masking`, `collate`, `loader`. `flags` describes
the command line's fields for every package.
"""

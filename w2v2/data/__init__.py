"""Manifests and audio → the micro-batches of every update.

In: manifest files or folders, audio files of any rate. Out: `PretrainBatch`: waveforms at 16 kHz, mask spans,
distractors. Which audio: `folders`, `readers`, `segments`, `manifest`, `utterances`. Its samples: `decoding`, `audio`.
Which crops make an update: `hashing`, `batching`, `cutting`. What a device gets: `masking`, `collate`.
"""

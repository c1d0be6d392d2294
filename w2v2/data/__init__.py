"""Manifests and audio → the micro-batches of every update.

In: manifest files or folders, audio files of any rate. Out: `PretrainBatch`: waveforms at 16 kHz, mask spans,
distractors. Samples: `decoding`, `audio`. What is found out about files: `inspection`. Which audio: `folders`,
`readers`, `segments`, `manifest`, `utterances`. Which crops make an update: `hashing`, `batching`, `cutting`. What a
device gets: `masking`, `collate`.
"""

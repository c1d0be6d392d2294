"""Manifests and audio → the micro-batches of every update.

In: manifest files or folders, audio files of any rate. Out: `PretrainBatch`: waveforms at 16 kHz, mask spans,
distractors. Samples: `files` and addresses in containers, `decoding`, `audio`. What is found out about files:
`inspection`. Which crops make an update: `hashing`, `batching`, `cutting`, and `sampling` where sources are mixed. What
a device gets: `masking`, `collate`.
Which audio, in steps: `readers.read_table` (with `folders`, `json_rows`, `lhotse_cuts`) reads one manifest as it is
written, `archives.read_tars` (with `tar_index`) tars; `columns` knows the names of columns.
Where shards are streamed, `shards.read_shards` (with `shard_index` and `shard_cache`) gives such a table, and
`streaming` their order. `manifest.read_manifests` (with `segments`) makes one table of all manifests of a call, with lengths; `sources` one of a
sources file's. `utterances` maps this table from a file: `load_manifest` all of it, `load_utterances` what pretraining
hears; `finetune.ctc_data.read_utterances` leaves out what does not open.
"""

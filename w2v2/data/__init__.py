"""A table of utterances → the micro-batches of every update.

`utterances` keeps those that a run hears. Which of them come next: `batching` (with `hashing`, `cutting`), mixed by
`sampling`, or shard by shard: `streaming`, with `shards`, `shard_index` and `shard_cache`. What a device gets: `rows`,
`masking`, `collate` (a `PretrainBatch`: waveforms at 16 kHz, mask spans, distractors), `filling`, by way of `loader`.
"""

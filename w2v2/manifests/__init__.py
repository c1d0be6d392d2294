"""Corpora of any form → one table: id, audio, start, number of samples, and what else is told of an utterance.

Files, in reading order: `columns` has the names that the field uses. `readers` reads a file or folder as it is written,
with `json_rows`, `lhotse_cuts` and `folders`; `tar_index` and `archives` read tars; `dataset_loading` and
`hub_datasets` data sets of Hugging Face. `segments` finds which part of a file a row is. `manifest.read_manifests` makes
the one table, batch by batch with `tables`. `sources` reads a list of corpora.
"""

"""From micro-batches to a trained model in a folder that can be resumed exactly.

In: micro-batches and a model. Out: checkpoints, `metrics.jsonl` and the other records of a run. In reading order:
schedule, recipes, state, identity, update (the training step), micro_batch, capture, launch, run_folder, checkpoint,
durable, records, log, events, trackers, collapse.
"""

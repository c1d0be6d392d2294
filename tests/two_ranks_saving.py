"""Saves that fail on the main process alone, and the choice of a checkpoint: what `test_checkpoint_faults.py` launches
twice.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python tests/two_ranks_saving.py FOLDER
"""

import contextlib
import json
import sys
from pathlib import Path

from tiny_run import MODEL, Run, file_size_limit, flip, prepare
from transformers import Wav2Vec2FeatureExtractor

from w2v2.errors import UserError
from w2v2.train.checkpoint import save_model
from w2v2.train.launch import leave_group


def outcome(action):
    """The name of what `action` returns, or what it complains of."""
    try:
        path = action()
    except UserError as error:
        return str(error)
    return path and path.name


def main(folder: Path) -> None:
    run = Run()
    accelerator = run.accelerator
    assert accelerator.num_processes == 2
    runs, found = folder / "run", {}
    run.save(runs, 2)
    with file_size_limit(100_000) if accelerator.is_main_process else contextlib.nullcontext():
        found["stop"] = outcome(lambda: run.save(runs, 4))
        found["warn"] = outcome(lambda: run.save(runs, 4, on_failure="warn"))
        extractor = Wav2Vec2FeatureExtractor()
        found["model"] = outcome(lambda: save_model(runs, accelerator, run.model, extractor))
    found["saved"] = outcome(lambda: run.save(runs, 4, on_failure="warn"))
    if accelerator.is_main_process:
        flip(runs / "checkpoint-4" / MODEL, 5_000)
    accelerator.wait_for_everyone()
    found["named"] = outcome(lambda: prepare(runs, runs / "checkpoint-4"))
    found["auto"] = outcome(lambda: prepare(runs, "auto"))
    if not accelerator.is_main_process:  # as on a machine that does not share the folder
        Path.is_dir = lambda path: False
    found["unseen"] = outcome(lambda: prepare(runs, "auto"))
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    leave_group()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

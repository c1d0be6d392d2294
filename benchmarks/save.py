"""How long a save holds up training: as it is, and what snapshots in memory with a writing thread would make of it.

    python benchmarks/save.py --folder runs             # on the disk that matters: a checkpoint of BASE, weights and two moments

A row a stage, medians of `--saves` saves. `save` is the whole of `save_checkpoint`, which training waits for. Of the parts, one after another,
`write` is safetensors' writing, `fsync` the wait for the disk, `sha256` reading the files through; the save overlaps the last two. A writing
thread would leave the `snapshot` (copying weights and moments in memory) and what the thread takes from the main one: `longest stop` is the longest
time for which a loop in the main thread did not run while another thread saved (a writer that keeps Python's lock stops it for all of a file).
"""

import argparse
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from report import environment, json_line, median_spread, print_table  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from stages import synchronize  # noqa: E402
from transformers import Wav2Vec2FeatureExtractor  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from w2v2.model.config import load_config  # noqa: E402
from w2v2.model.pretraining import PretrainingModel  # noqa: E402
from w2v2.train.checkpoint import save_checkpoint  # noqa: E402
from w2v2.train.durable import sync, write_checksums  # noqa: E402
from w2v2.train.resume import find_damage  # noqa: E402


@dataclass
class Step:
    """What `save_checkpoint` asks of a run's state."""

    step: int

    def as_dict(self) -> dict:
        return {"step": self.step}


class Saved:
    """A model with moments, and the folder that it is saved to."""

    def __init__(self, config_name: str, folder: Path):
        self.folder, self.feature_extractor = folder, Wav2Vec2FeatureExtractor()
        disable_progress_bar()
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        model = PretrainingModel._from_config(load_config(None, config_name))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int) -> Path:
        self.state = Step(step)
        return save_checkpoint(self.folder, self, keep=1)

    def snapshot(self) -> list[torch.Tensor]:
        states = self.optimizer.optimizer.state_dict()["state"].values()
        tensors = [*self.model.state_dict().values(), *(value for state in states for value in state.values())]
        return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def seconds(action, device: torch.device) -> tuple[float, float]:
    """By the clock, and of the processor's time (all threads together): what a machine that is busy otherwise does not change."""
    synchronize(device)
    started, processor = time.perf_counter(), time.process_time()
    action()
    synchronize(device)
    return time.perf_counter() - started, time.process_time() - processor


def parts(checkpoint: Path, scratch: Path) -> dict[str, float]:
    """Seconds of writing, of waiting for the disk and of reading through, for the files of one checkpoint."""
    scratch.mkdir()
    tensors = {path.name: load_file(path) for path in checkpoint.rglob("*.safetensors")}
    tensors = {name: {key: value.clone() for key, value in values.items()} for name, values in tensors.items()}
    started = time.perf_counter()
    for name, values in tensors.items():
        save_file(values, scratch / name)
    written = time.perf_counter()
    for name in tensors:
        sync(scratch / name)
    durable = time.perf_counter()
    write_checksums(scratch, "checksums.json")
    sealed = time.perf_counter()
    found = {"write": written - started, "fsync": durable - written, "sha256": sealed - durable}
    found["verify"] = -time.perf_counter()
    assert find_damage(checkpoint) is None
    found["verify"] += time.perf_counter()
    shutil.rmtree(scratch)
    return found


def longest_stop(action) -> float:
    """The most seconds for which this thread stands still while another one runs `action`."""
    thread = threading.Thread(target=action)
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_name", default="base", help="name in configs/models, or a folder")
    parser.add_argument("--folder", default=".", help="where to save; what is written is removed again")
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".save-", dir=args.folder))
    try:
        saved = Saved(args.config_name, folder)
        device = saved.accelerator.device
        checkpoint = saved.save(0)
        num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        found: dict[str, list[float]] = {}
        for step in range(1, args.saves + 1):
            row = dict(zip(("save", "save, CPU"), seconds(lambda step=step: saved.save(step), device), strict=True))
            row |= parts(folder / f"checkpoint-{step}", folder / "scratch")
            row |= zip(("snapshot", "snapshot, CPU"), seconds(saved.snapshot, device), strict=True)
            row["longest stop"] = longest_stop(lambda step=step: saved.save(step))
            for stage, value in row.items():
                found.setdefault(stage, []).append(value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spreads = {stage: median_spread(values) for stage, values in found.items()}
    print(f"a checkpoint of {num_bytes / 1e9:.2f} GB in {args.folder}, seconds:")
    print_table([[stage, *spread.values()] for stage, spread in spreads.items()], ["stage", "median", "min", "max"])
    json_line(environment() | {"bytes": num_bytes, "seconds": spreads})


if __name__ == "__main__":
    main()

"""Forward and backward pass of a micro-batch as one CUDA graph: one launch in place of some 1,600.

All micro-batches of a run then have one shape (`w2v2/data/filling.py`), gradients are added up where they are, and the
noise is seeded before each replay as it is before each pass without a graph. The model is not wrapped
by DDP, whose hooks do not run in a replay: the gradients lie in one buffer, which all ranks sum once an update.
"""

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from w2v2.data.batching import Cursor, EffectiveBatches, PlanStream, find_size
from w2v2.data.collate import PretrainBatch, build_batch, sound
from w2v2.data.filling import Sizes, find_sizes
from w2v2.errors import refuse
from w2v2.model.feature_encoder import is_flat
from w2v2.model.pretraining import PretrainSums
from w2v2.model.transformer import takes_any_lengths
from w2v2.train.schedule import UpdateSettings

MASKED_UPDATES = 3  # that say how many masked frames there are
WARM_UP = 3  # passes before the capture, in which libraries choose kernels and take their workspaces


def check_capture(args, accelerator: Accelerator) -> None:
    """Refuse what a CUDA graph cannot hold."""
    on_gpu = accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"
    excluded = (
        (accelerator.distributed_type == DistributedType.FSDP, "FSDP"),
        (args.gradient_checkpointing, "--gradient_checkpointing"),
        (args.torch_compile, "--torch_compile"),
        (args.diversity_scope == "effective_batch", "--diversity_scope effective_batch, which takes two passes,"),
        (args.positional_conv == "stock", "--positional_conv stock"),
        (args.gradient_compression != "none", f"--gradient_compression {args.gradient_compression}"),
    )
    refuse(
        (
            not on_gpu,
            "--cuda_graph needs an NVIDIA GPU and mixed_precision: bf16, and one of them is missing here: leave it out",
        ),
        *((found, f"--cuda_graph and {what} exclude one another: leave out one of them") for found, what in excluded),
    )


def find_run_sizes(run, batches: EffectiveBatches) -> Sizes:
    """Sizes of all micro-batches of this rank, from the first updates' masks. `run` is `pretrain.Run`."""
    cut = run.cut_arguments
    plans = PlanStream(batches, Cursor(), range(MASKED_UPDATES), **cut)
    silent = []
    for plan in plans:
        waveforms = [np.zeros(length, np.int16) for length in plan.crops.num_samples]
        silent.append(build_batch(plan, plan.crops, waveforms, run.framing, run.args.seed))
    return find_sizes(silent, find_size(batches, cut["num_ranks"], cut["micro_batch_samples"]))


class CapturedStep:
    """Runs micro-batches forward and backward, and adds their gradients to `.grad`.

    The first micro-batch that is filled up is captured. Others of its shape are replays; one that does not fit into it
    runs as it is, and is counted.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module):
        self.accelerator, self.model = accelerator, accelerator.unwrap_model(model)
        self.num_eager = 0  # micro-batches that were too large for the graph
        self.batch: PretrainBatch | None = None  # what the graph reads
        device, config = accelerator.device, self.model.config
        heads = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        has_flash = takes_any_lengths(torch.empty(0, *heads, dtype=torch.bfloat16, device=device))
        refuse(
            (
                not has_flash,
                "--cuda_graph needs the flash kernel, which does not support this GPU or this width of heads: leave it out",
            ),
            (not is_flat(config), "--cuda_graph needs convs of strides 5, 2, 2 … and kernels of 2 or 3: leave it out"),
        )
        # (3,) the factor of the loss, the Gumbel temperature and the diversity loss's weight: they vary over a run.
        self.settings = torch.zeros(3, device=device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.gradients = torch.zeros(sum(map(torch.numel, self.parameters)), device=device)

    def begin(self) -> None:
        """Before an update: gradients of zero, where the graph adds to them."""
        self.gradients.zero_()
        parts = self.gradients.split([parameter.numel() for parameter in self.parameters])
        for parameter, gradient in zip(self.parameters, parts, strict=True):
            parameter.grad = gradient.view_as(parameter)

    def __call__(self, batch: PretrainBatch, settings: UpdateSettings, scale: float, mean_codes=None) -> PretrainSums:
        """The sums of a micro-batch. The gradient of its loss over `scale` is added to what there is."""
        if not batch.weight and self.batch is not None:
            return PretrainSums(*(torch.zeros_like(x) for x in self.sums))
        now = 1.0 / scale, settings.gumbel_temperature, settings.diversity_weight
        for place, value in zip(self.settings, now, strict=True):
            place.fill_(value)  # a copy would wait for the device
        batch = replace(batch, samples=sound(batch.samples))
        if not batch.is_filled or not batch.weight:
            self.num_eager += batch.weight > 0
            return self._run(batch)
        if self.batch is None:
            self._capture(batch)
        for mine, new in zip(tensors(self.batch), tensors(batch), strict=True):
            mine.copy_(new, non_blocking=True)
        self.replay()
        return PretrainSums(*(x.clone() for x in self.sums))

    def end(self) -> None:
        """After an update's micro-batches: gradients summed over all ranks."""
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(self.gradients)

    def _run(self, batch: PretrainBatch) -> PretrainSums:
        factor, temperature, diversity_weight = self.settings.unbind()
        with self.accelerator.autocast():
            sums = self.model(batch, temperature, diversity_weight)
        (sums.loss * factor).backward()
        return PretrainSums(*(x.detach() for x in sums))

    def _capture(self, batch: PretrainBatch) -> None:
        """Capture a pass over a copy of the micro-batch; gradients and generators are then as they were."""
        self.batch = batch.map(torch.Tensor.clone)
        kept, device = self.gradients.clone(), batch.keys.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.replay, self.sums = record(lambda: self._run(self.batch))
        self.gradients.copy_(kept)


def record(step):
    """A CUDA graph of `step`: what replays it, and what `step` returned, which each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's thread pins memory meanwhile
        out = step()
    return graph.replay, out


def tensors(batch: PretrainBatch) -> list[torch.Tensor]:
    found = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found

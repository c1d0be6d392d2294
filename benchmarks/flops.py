"""Operations of wav2vec 2.0: two for each multiplication with its addition; backward is twice the forward.

Each utterance is counted alone, for the audio heard: padding and recomputation are an implementation's own affair.
There are two counts. `model_flops` is the formula that papers use: a layer counts for all frames of the utterances that
layerdrop leaves it, and every input has a gradient. `executed_flops` is what this program computes: the last layer's
queries, output and feed-forward network for masked frames alone, no gradient for the waveform; and, on a GPU, layers
also for the utterances that layerdrop takes from them.
"""

import re
from collections import Counter
from collections.abc import Iterable

import torch

# Dense bf16 TFLOP/s by the makers' data sheets; the first whose words stand in the GPU's name counts.
PEAKS = (("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("A100", 312), ("L40S", 362), ("L4", 121),
         ("RTX 4090", 165), ("A10", 125))  # fmt: skip
MASKED = 0.49  # share of the frames, of mask_time_prob 0.65 in spans of ten


def peak_flops() -> float | None:
    """FLOP/s of this machine's GPU at its peak, None where there is none or it is not in the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for words, peak in PEAKS if re.search(rf"\b{words}\b", name)), None)


def forward_flops(config, num_samples: int, masked: float | None = None, skips: bool = True) -> dict[str, float]:
    """Operations of one forward pass over one utterance, by stage: the formula's, or those that are executed.

    masked: the share of masked frames, for those that are executed. The last layer gives no other frame's output.
    skips: whether layers skip the utterances that layerdrop takes from them. The last one never does.
    """
    frames, channels, convs = num_samples, 1, []
    for out, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        convs.append(2.0 * frames * channels * kernel * out)
        channels = out
    D = config.hidden_size
    kept, L = 1.0 - config.layerdrop, config.num_hidden_layers
    # How often a layer is run for a frame; how often only its keys and values are.
    layers = kept * L if masked is None else (kept if skips else 1.0) * (L - 1) + masked
    keys_values = 0.0 if masked is None else 1.0 - masked
    codebook = config.num_codevector_groups * config.num_codevectors_per_group
    head = D * config.proj_codevector_dim + channels * codebook + config.codevector_dim * config.proj_codevector_dim
    return {
        "first conv": convs[0],
        "convs": sum(convs[1:]),
        "projection": 2.0 * frames * channels * D,
        "positional": 2.0 * frames * D * (D // config.num_conv_pos_embedding_groups) * config.num_conv_pos_embeddings,
        "linear": 2.0 * frames * (layers * (4 * D * D + 2 * D * config.intermediate_size) + keys_values * 2 * D * D),
        "attention": layers * 4.0 * frames * frames * D,
        "head": 2.0 * MASKED * frames * head,
    }


def model_flops(config, lengths: Iterable[int]) -> float:
    """Operations of training on utterances of these lengths in samples, by the formula."""
    return sum(3.0 * count * sum(forward_flops(config, n).values()) for n, count in Counter(lengths).items())


def executed_flops(config, lengths: Iterable[int], on_gpu: bool) -> float:
    """Operations of training on them that this program executes, padding and recomputation left out."""
    total = 0.0
    for n, count in Counter(lengths).items():
        stages = forward_flops(config, n, MASKED, skips=not on_gpu)
        total += count * (3.0 * sum(stages.values()) - stages["first conv"])
    return total

"""Operations of wav2vec 2.0 by formula: two for each multiplication with its addition, backward counted as twice the
forward pass.

Each utterance is counted alone, for the audio heard: padding and recomputation are an implementation's own affair.
"""

import re
from collections import Counter
from collections.abc import Iterable

import torch

# Dense bf16 FLOP/s by the makers' data sheets; the first whose words stand in the GPU's name counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
}


def peak_flops() -> float | None:
    """Peak of this machine's GPU, None where there is none or it is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


def forward_flops(config, num_samples: int) -> dict[str, float]:
    """Operations of one forward pass over one utterance, by stage."""
    frames, channels, convs = num_samples, 1, 0.0
    for out, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        convs += 2.0 * frames * channels * kernel * out
        channels = out
    D, layers = config.hidden_size, config.num_hidden_layers
    run = layers * (1.0 - config.layerdrop)  # what layerdrop leaves, on average
    masked = 0.49 * frames  # of mask_time_prob 0.65 in spans of ten
    codebook = config.num_codevector_groups * config.num_codevectors_per_group
    head = D * config.proj_codevector_dim + channels * codebook + config.codevector_dim * config.proj_codevector_dim
    return {
        "convs": convs,
        "projection": 2.0 * frames * channels * D,
        "positional": 2.0 * frames * D * (D // config.num_conv_pos_embedding_groups) * config.num_conv_pos_embeddings,
        "linear": run * 2.0 * frames * (4 * D * D + 2 * D * config.intermediate_size),
        "attention": run * 4.0 * frames * frames * D,
        "head": 2.0 * masked * head,
    }


def model_flops(config, lengths: Iterable[int]) -> float:
    """Operations of training on utterances of these lengths in samples."""
    return sum(3.0 * count * sum(forward_flops(config, n).values()) for n, count in Counter(lengths).items())

"""Operations of wav2vec 2.0 by formula: two for each multiplication with its addition; backward is twice the forward.

Each utterance is counted alone, for the audio heard: padding and recomputation are an implementation's own affair.
"""

import re
from collections import Counter
from collections.abc import Iterable

import torch

# Dense bf16 TFLOP/s by the makers' data sheets; the first whose words stand in the GPU's name counts.
PEAKS = (("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989), ("H200", 989), ("A100", 312), ("L40S", 362), ("L4", 121),
         ("RTX 4090", 165), ("A10", 125))  # fmt: skip


def peak_flops() -> float | None:
    """FLOP/s of this machine's GPU at its peak, None where there is none or it is not in the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for words, peak in PEAKS if re.search(rf"\b{words}\b", name)), None)


def forward_flops(config, num_samples: int) -> dict[str, float]:
    """Operations of one forward pass over one utterance, by stage."""
    frames, channels, convs = num_samples, 1, 0.0
    for out, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        convs += 2.0 * frames * channels * kernel * out
        channels = out
    D = config.hidden_size
    run = config.num_hidden_layers * (1.0 - config.layerdrop)  # what layerdrop leaves, on average
    codebook = config.num_codevector_groups * config.num_codevectors_per_group
    head = D * config.proj_codevector_dim + channels * codebook + config.codevector_dim * config.proj_codevector_dim
    return {
        "convs": convs,
        "projection": 2.0 * frames * channels * D,
        "positional": 2.0 * frames * D * (D // config.num_conv_pos_embedding_groups) * config.num_conv_pos_embeddings,
        "linear": run * 2.0 * frames * (4 * D * D + 2 * D * config.intermediate_size),
        "attention": run * 4.0 * frames * frames * D,
        "head": 2.0 * 0.49 * frames * head,  # the masked share, of mask_time_prob 0.65 in spans of ten
    }


def model_flops(config, lengths: Iterable[int]) -> float:
    """Operations of training on utterances of these lengths in samples."""
    return sum(3.0 * count * sum(forward_flops(config, n).values()) for n, count in Counter(lengths).items())

"""The convolutional feature encoder as matrix products on flat, channels-last memory.

Every layer after the first halves the frame rate. Each utterance begins on a slot of its own, as many samples as one
latent frame advances, so all utterances and layers tile one matrix without gaps: a layer is the matrix of its input's
frame *pairs* times its weight. A kernel of three adds the next pair's first frame. The frames past an utterance's end
look into the next one. They feed only such frames, which nobody hears.

BASE's group norm is folded into the first convolution with the statistics of each utterance's own frames. Only the
stock modules' parameters are used.

Shapes: B utterances, N slots, S samples of a row, T frames, C channels in, O channels out, k taps, W windows of the
first convolution in a slot (64).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from w2v2.data.masking import latent_lengths, least_samples
from w2v2.data.rows import Rows
from w2v2.model.cpu import linear, product
from w2v2.model.transformer import norm


def is_flat(config) -> bool:
    """Whether the flat layout holds: strides of 2 after the first, kernels of 2 or 3, no bias under a group norm."""
    (kernel, *kernels), (stride, *strides) = config.conv_kernel, config.conv_stride
    has_biased_norm = config.feat_extract_norm == "group" and config.conv_bias
    return stride < kernel <= 2 * stride and set(strides) <= {2} and set(kernels) <= {2, 3} and not has_biased_norm


class _PairsWithNext(torch.autograd.Function):
    """Convolution of kernel 3 and stride 2 on a flat (N, C) matrix, N even, as two products without copies: (N/2, O).

    The two read overlapping views, and autograd would hold a gradient of each.
    """

    @staticmethod
    def forward(ctx, x, weight):  # weight (O, C, 3)
        pairs = x.view(len(x) // 2, -1)  # (N, C) -> (N/2, 2 · C)
        first_two = weight[:, :, :2].transpose(1, 2).flatten(1)  # (O, C, 2) -> (O, 2 · C)
        third = weight[:, :, 2].contiguous()  # (O, C)
        out = product(pairs, first_two)
        out[:-1].addmm_(pairs[1:, : x.shape[1]], third.T)
        ctx.save_for_backward(x, first_two, third)
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, first_two, third = ctx.saved_tensors
        channels, pairs = x.shape[1], x.view(len(x) // 2, -1)
        d_weight = torch.cat([gradient.T @ pairs, gradient[:-1].T @ pairs[1:, :channels]], 1)  # (O, 3 · C)
        d_pairs = product(gradient, first_two.T)
        d_pairs[1:, :channels].addmm_(gradient[:-1], third)
        return d_pairs.view(-1, channels), d_weight.unflatten(1, (3, -1)).transpose(1, 2)  # (N, C), (O, C, 3)


def _fold_norm(windows: torch.Tensor, rows: Rows, num_samples: torch.Tensor, layer: nn.Module) -> tuple:
    """First convolution and group norm as one affine map an utterance: weight (B, C, k), offset (B, C), in float64; and
    whose each slot is, (N, B).

    A linear map w of windows (N, W, k) with mean μ and covariance Σ has the mean wᵀμ and the variance wᵀΣw.
    """
    conv, group_norm, (N, W, k) = layer.conv, layer.layer_norm, windows.shape
    with torch.no_grad():
        count = latent_lengths(num_samples, conv.kernel_size, conv.stride)  # (B,)
        slot, window, row = (torch.arange(n, device=count.device) for n in (N, W, len(count)))
        inside = ((slot - rows.first[rows.row]) * W)[:, None] + window < count[rows.row, None]  # (N, W)
        u, own = torch.where(inside[..., None], windows.double(), 0.0), (rows.row[:, None] == row).double()
        mean = own.T @ u.sum(1) / count[:, None]  # (B, k)
        squares = own.T @ (u.transpose(1, 2) @ u).flatten(1) / count[:, None]  # (B, k · k)
        covariance = squares.view(-1, k, k) - mean[:, :, None] * mean[:, None]
    weight = conv.weight[:, 0].double()  # (C, k)
    variance = torch.einsum("ck,bkl,cl->bc", weight, covariance, weight)
    gain = torch.rsqrt(variance + group_norm.eps) * group_norm.weight.double()  # (B, C)
    folded = gain[:, :, None] * weight  # (B, C, k)
    return folded, group_norm.bias.double() - (folded * mean[:, None]).sum(-1), own


def _affine(windows, weight, offset, own: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """windows (N, W, k) times weight (B, C, k) plus offset (B, C), those of a slot's `own` utterance → (N, W, C) in `dtype`.

    own: (N, B), ones and zeros. A product with it takes an utterance's rows, and sums their gradient, in float32.
    A 16-bit type alone would round the waveform and the folded weights away. So its product is over the high and low
    half of each, [x_hi x_lo x_hi 1 1] · [w_hi w_hi w_lo b_hi b_lo], which carries twice the bits.
    """

    def take(x):
        return (own.to(dtype) @ x.to(dtype).flatten(1)).view(-1, *x.shape[1:])  # (B, …) -> (N, …)

    if dtype not in (torch.bfloat16, torch.float16):
        return torch.baddbmm(take(offset)[:, None], windows.to(dtype), take(weight).transpose(1, 2))

    def halves(x):
        high = x.to(dtype)
        return high, (x - high.to(x.dtype)).to(dtype)

    (x_high, x_low), (w_high, w_low), (b_high, b_low) = halves(windows), halves(weight), halves(offset[..., None])
    x = torch.cat([x_high, x_low, x_high, torch.ones_like(x_high[..., :2])], -1)
    return x @ take(torch.cat([w_high, w_high, w_low, b_high, b_low], -1)).transpose(1, 2)


def flat_features(samples: torch.Tensor, rows: Rows, num_samples: torch.Tensor, extractor: nn.Module) -> torch.Tensor:
    """Samples (N · slot,) → latent frames (N, C), each utterance's as if it were alone, in autocast's type.

    A slot past the frames of its utterance holds garbage.
    """
    (first, *others), device = extractor.conv_layers, samples.device.type
    kernel, stride = first.conv.kernel_size[0], first.conv.stride[0]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else samples.dtype
    with torch.autocast(device, enabled=False):
        # 1. The first convolution, with BASE's group norm folded in: (N · slot,) -> (N, W, C).
        N, slot = len(rows.row), len(samples) // len(rows.row)
        windows = F.pad(samples, (0, kernel - stride)).as_strided((N, slot // stride, kernel), (slot, stride, 1))
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            x = first.activation(_affine(windows, *_fold_norm(windows, rows, num_samples, first), dtype))
        else:
            weight = first.conv.weight[None, :, 0]  # (1, C, k)
            bias = weight.new_zeros(weight.shape[:2]) if first.conv.bias is None else first.conv.bias[None]
            x = _activate(_affine(windows.flatten(0, 1)[None], weight, bias, rows.row.new_ones(1, 1), dtype), first)

        # 2. The others halve the frames: (frames, C) -> (frames / 2, C).
        x = x.flatten(0, 1)
        for layer in others:
            weight = layer.conv.weight.to(dtype)  # (O, C, 2 or 3)
            if weight.shape[-1] == 3:
                x = _PairsWithNext.apply(x, weight)
            else:
                x = linear(x.view(len(x) // 2, -1), weight.transpose(1, 2).flatten(1))
            if layer.conv.bias is not None:
                x = x + layer.conv.bias.to(dtype)
            x = _activate(x, layer)
    return x


def _activate(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Layer norm over the channels, if the layer has one, and activation."""
    return layer.activation(norm(layer.layer_norm, x) if hasattr(layer, "layer_norm") else x)


def stock_features(samples: torch.Tensor, rows: Rows, num_samples: torch.Tensor, extractor: nn.Module) -> torch.Tensor:
    """The same through the stock layers, one utterance at a time, for configurations that are not flat."""
    slot, found = len(samples) // len(rows.row), []
    for first, length, T in zip(rows.first.tolist(), num_samples.tolist(), rows.lengths, strict=True):
        x = samples[first * slot :][:length][None, None]
        for layer in extractor.conv_layers:
            x = layer(x)  # (1, C, frames)
        found.append(F.pad(x[0].T, (0, 0, 0, T - x.shape[-1])))
    return rows.join(found)


def num_frames(config: Wav2Vec2Config, num_samples: int) -> int:
    """Latent frames of so many samples."""
    return int(latent_lengths(torch.tensor(num_samples), config.conv_kernel, config.conv_stride))


def min_samples(config: Wav2Vec2Config) -> int:
    """Samples of a single latent frame: less than that is no input."""
    return least_samples(1, config.conv_kernel, config.conv_stride)


def encoder_of(config: Wav2Vec2Config) -> Callable[[torch.Tensor, Rows, torch.Tensor, nn.Module], torch.Tensor]:
    """`flat_features` where the configuration allows it."""
    return flat_features if is_flat(config) else stock_features


class LoneRowsFeatureEncoder(Wav2Vec2FeatureEncoder):
    """The stock convs, but each row comes out as if alone; stock group norm over time lets padding change all frames."""

    config: Wav2Vec2Config
    num_samples: torch.Tensor | None = None  # (B,) of the batch at hand; None: no padding

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        (B, S), slot = input_values.shape, math.prod(self.config.conv_stride)
        frames = torch.full((B,), num_frames(self.config, S))
        rows = Rows.build(frames, S // slot + 1 - frames).map(lambda x: x.to(input_values.device))
        num_samples = torch.full_like(rows.first, S) if self.num_samples is None else self.num_samples
        samples = F.pad(input_values, (0, slot - S % slot)).flatten()
        features = encoder_of(self.config)(samples, rows, num_samples, self)
        return torch.stack(rows.split(features)).transpose(1, 2)  # B times (T, C) -> (B, C, T)


def hide_padding(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's output for an utterance independent of its neighbours in the batch, in training and evaluation.

    Weights, keys and class stay stock. A batch too short for one mask span goes unmasked; the stock model would raise.
    """
    base = model.wav2vec2
    encoder = LoneRowsFeatureEncoder(model.config)
    encoder.config = model.config
    encoder.load_state_dict(base.feature_extractor.state_dict())
    base.feature_extractor = encoder.to(base.device, base.dtype)
    base.register_forward_pre_hook(_before_forward, with_kwargs=True)
    return model


def _before_forward(base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    input_values = args[0] if args else kwargs["input_values"]
    attention_mask = kwargs.get("attention_mask")
    base.feature_extractor.num_samples = None if attention_mask is None else attention_mask.sum(-1)
    shape = len(input_values), num_frames(base.config, input_values.shape[1])
    if base.training and base.config.mask_time_prob > 0 and shape[1] < base.config.mask_time_length:
        kwargs["mask_time_indices"] = torch.zeros(shape, dtype=torch.bool, device=input_values.device)
    return args, kwargs

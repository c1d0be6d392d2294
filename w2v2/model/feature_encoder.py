"""The convolutional feature encoder as matrix products on flat, channels-last memory.

Every layer after the first halves the frame rate, so with rows of 320·n samples all rows and layers tile one matrix without gaps:
a layer is the matrix of its input's frame *pairs* times its weight, plus, for kernels of three, the next pair's first frame.
One frame a row comes out wrong (it looks into the next row); it is the frame past the row's end and feeds only such frames.

BASE's group norm over time is folded into the first convolution: mean and variance of a linear map's output are exact functions of
the mean μ and covariance C of its input windows, var = wᵀCw. Taken over each row's own windows they are at the same time the masked
group norm, which padding does not reach.

LARGE's layer norms are over the channels, which lie side by side here, where the stock layers transpose twice for each.

Shapes: B utterances, S samples (a multiple of the stride), T frames, C channels, k taps. Only the stock modules' parameters are used.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from w2v2.data.masking import latent_lengths
from w2v2.model.cpu import linear, product


def is_flat(config) -> bool:
    """Whether the flat layout holds: strides of two after the first, kernels of two or three; no bias under a group norm."""
    first_kernel, first_stride = config.conv_kernel[0], config.conv_stride[0]
    return (
        (config.feat_extract_norm == "layer" or not config.conv_bias)
        and first_stride < first_kernel <= 2 * first_stride
        and all(s == 2 for s in config.conv_stride[1:])
        and all(k in (2, 3) for k in config.conv_kernel[1:])
    )


class _PairsWithNext(torch.autograd.Function):
    """Convolution of kernel 3 and stride 2 on a flat (N, C) matrix, N even, as two products without copies: (N/2, O).

    Written by hand because the two products read overlapping views, whose gradients autograd would materialise apart.
    """

    @staticmethod
    def forward(ctx, x, weight):  # weight (O, C, 3)
        pairs = x.view(len(x) // 2, -1)
        first_two = weight[:, :, :2].transpose(1, 2).flatten(1)  # (O, 2·C)
        third = weight[:, :, 2].contiguous()  # (O, C)
        out = product(pairs, first_two)
        out[:-1].addmm_(pairs[1:, : x.shape[1]], third.T)
        ctx.save_for_backward(x, first_two, third)
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, first_two, third = ctx.saved_tensors
        channels = x.shape[1]
        pairs = x.view(len(x) // 2, -1)
        weight = torch.empty(len(third), channels, 3, dtype=x.dtype, device=x.device)
        weight[:, :, :2] = (gradient.T @ pairs).unflatten(1, (2, channels)).transpose(1, 2)
        weight[:, :, 2] = gradient[:-1].T @ pairs[1:, :channels]
        back = product(gradient, first_two.T)
        back[1:, :channels].addmm_(gradient[:-1], third)
        return back.view(-1, channels), weight


def _halve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One convolution of stride 2 and kernel 2 or 3 on a flat (N, C) matrix → (N/2, O)."""
    if weight.shape[-1] == 3:
        return _PairsWithNext.apply(x, weight)
    return linear(x.view(len(x) // 2, -1), weight.transpose(1, 2).flatten(1))


def _windows(waveforms_BS: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Input windows of the first convolution, (B, S / stride, k): a view."""
    B, S = waveforms_BS.shape
    return F.pad(waveforms_BS, (0, stride)).as_strided((B, S // stride, kernel), (S + stride, stride, 1))


def _folded_norm(windows: torch.Tensor, num_samples_B: torch.Tensor, layer: nn.Module) -> tuple[torch.Tensor, ...]:
    """First convolution and group norm as one affine map a row: weight (B, C, k) and offset (B, C), in float64."""
    conv, norm = layer.conv, layer.layer_norm
    with torch.no_grad():
        count = latent_lengths(num_samples_B, conv.kernel_size, conv.stride)
        inside = torch.arange(windows.shape[1], device=count.device) < count[:, None]
        u = torch.where(inside[..., None], windows.double(), 0.0)
        mean = u.sum(1) / count[:, None]  # (B, k)
        centred = torch.where(inside[..., None], u - mean[:, None], 0.0)
        covariance = centred.transpose(1, 2) @ centred / count[:, None, None]  # (B, k, k)
    weight = conv.weight[:, 0].double()  # (C, k)
    variance = torch.einsum("ck,bkl,cl->bc", weight, covariance, weight)
    gain = torch.rsqrt(variance + norm.eps) * norm.weight.double()  # (B, C)
    folded = gain[:, :, None] * weight  # (B, C, k)
    return folded, norm.bias.double() - (folded * mean[:, None]).sum(-1)


def _affine(windows: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """windows (B, T, k) times weight (B, C, k) plus offset (B, C) → (B, T, C) in `dtype`.

    A 16-bit type alone would round the waveform and the folded weights away: its product is taken over both halves of each, high and low,
    [x_hi x_lo x_hi 1 1] · [w_hi w_hi w_lo b_hi b_lo], which carries twice the bits (and is 32 wide for ten taps).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.baddbmm(offset[:, None].to(dtype), windows.to(dtype), weight.transpose(1, 2).to(dtype))

    def halves(x):
        high = x.to(dtype)
        return high, (x - high.to(x.dtype)).to(dtype)

    (x_high, x_low), (w_high, w_low), (b_high, b_low) = halves(windows), halves(weight), halves(offset[..., None])
    x = torch.cat([x_high, x_low, x_high, torch.ones_like(x_high[..., :2])], -1)
    return x @ torch.cat([w_high, w_high, w_low, b_high, b_low], -1).transpose(1, 2)


def flat_features(waveforms_BS: torch.Tensor, num_samples_B: torch.Tensor, extractor: nn.Module) -> torch.Tensor:
    """Latent frames (B, T, C) of the feature encoder; each row as if it were alone. Under autocast in its type.

    Frames past a row's end are garbage.
    """
    layers, device = extractor.conv_layers, waveforms_BS.device.type
    first = layers[0]
    stride = first.conv.stride[0] * 2 ** (len(layers) - 1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else waveforms_BS.dtype
    with torch.autocast(device, enabled=False):
        waveforms_BS = F.pad(waveforms_BS, (0, -waveforms_BS.shape[1] % stride))
        windows = _windows(waveforms_BS, first.conv.kernel_size[0], first.conv.stride[0])
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            x = _affine(windows, *_folded_norm(windows, num_samples_B, first), dtype)
            x = first.activation(x)
        else:
            B, weight = len(windows), first.conv.weight[None, :, 0]
            bias = weight.new_zeros(weight.shape[:2]) if first.conv.bias is None else first.conv.bias[None]
            x = _activated(_affine(windows, weight.expand(B, -1, -1), bias.expand(B, -1), dtype), first)
        B, frames, channels = x.shape
        x = x.reshape(B * frames, channels)
        for layer in layers[1:]:
            x = _halve(x, layer.conv.weight.to(dtype))
            if layer.conv.bias is not None:
                x = x + layer.conv.bias.to(dtype)
            x = _activated(x, layer)
    return x.view(B, -1, x.shape[-1])


def _activated(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Layer norm over the channels, where the layer has one, and activation; the norm's statistics are float32 inside."""
    norm = getattr(layer, "layer_norm", None)
    if norm is not None:
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return layer.activation(x)


def stock_features(waveforms_BS: torch.Tensor, num_samples_B: torch.Tensor, extractor: nn.Module) -> torch.Tensor:
    """Latent frames (B, T, C) through the stock layers, for configurations that are not flat.

    A group norm takes its statistics over each row's own frames.
    """
    x = waveforms_BS[:, None]
    first = extractor.conv_layers[0]
    grouped = isinstance(getattr(first, "layer_norm", None), nn.GroupNorm)
    if grouped and not bool((num_samples_B == waveforms_BS.shape[1]).all()):
        x = first.conv(x)  # (B, C, T)
        count = latent_lengths(num_samples_B, first.conv.kernel_size, first.conv.stride)[:, None, None]
        inside = torch.arange(x.shape[-1], device=x.device) < count
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = torch.where(inside, x, 0.0).sum(-1, keepdim=True) / count
        variance = torch.where(inside, x - mean, 0.0).pow(2).sum(-1, keepdim=True) / count
        norm = first.layer_norm
        x = (x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight[:, None] + norm.bias[:, None]
        x = first.activation(torch.where(inside, x, 0.0))
        rest = extractor.conv_layers[1:]
    else:
        rest = extractor.conv_layers
    for layer in rest:
        x = layer(x)
    return x.transpose(1, 2)


def num_frames(config: Wav2Vec2Config, num_samples: int) -> int:
    """Latent frames of so many samples."""
    return int(latent_lengths(torch.tensor(num_samples), config.conv_kernel, config.conv_stride))


def min_samples(config: Wav2Vec2Config) -> int:
    """Samples of a single latent frame: less than that is no input."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


class LoneRowsFeatureEncoder(Wav2Vec2FeatureEncoder):
    """The stock convs and their parameters, but each row comes out as if it were alone in the batch.

    BASE's first conv is group-normed over time, so in the stock encoder padding changes every frame: word error rates would move
    with the batch size, and training would differ from inference.
    """

    num_samples: torch.Tensor | None = None  # (B,) of the batch at hand; None: no padding

    def __init__(self, config: Wav2Vec2Config):
        super().__init__(config)
        self._features = flat_features if is_flat(config) else stock_features
        self._kernels, self._strides = config.conv_kernel, config.conv_stride

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        B, S = input_values.shape
        whole = torch.full((B,), S, device=input_values.device)
        num_frames = int(latent_lengths(whole[:1].cpu(), self._kernels, self._strides))
        features = self._features(input_values, whole if self.num_samples is None else self.num_samples, self)
        return features[:, :num_frames].transpose(1, 2)  # (B, C, T)


def hide_padding(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's output for an utterance independent of its neighbours in the batch, in training and evaluation.

    Weights, keys and class stay stock. Besides the convs, a batch too short for one mask span goes unmasked, where the stock
    model raises.
    """
    base = model.wav2vec2
    encoder = LoneRowsFeatureEncoder(model.config)
    encoder.load_state_dict(base.feature_extractor.state_dict())
    base.feature_extractor = encoder.to(base.device, base.dtype)
    base.register_forward_pre_hook(_before_forward, with_kwargs=True)
    return model


def _before_forward(base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    input_values = args[0] if args else kwargs["input_values"]
    attention_mask = kwargs.get("attention_mask")
    base.feature_extractor.num_samples = None if attention_mask is None else attention_mask.sum(-1)
    num_frames = int(base._get_feat_extract_output_lengths(input_values.shape[1]))
    if base.training and base.config.mask_time_prob > 0 and num_frames < base.config.mask_time_length:
        shape = (len(input_values), num_frames)
        kwargs["mask_time_indices"] = torch.zeros(shape, dtype=torch.bool, device=input_values.device)
    return args, kwargs

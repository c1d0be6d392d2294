"""The convolutional feature encoder as matrix products on flat, channels-last memory.

Every layer after the first halves the frame rate. With rows of 320 · n samples all rows and layers tile one matrix
without gaps: a layer is the matrix of its input's frame *pairs* times its weight. A kernel of three adds the next
pair's first frame. One frame a row looks into the next row. It lies past the row's end and feeds only such frames.

Padding changes nothing: BASE's group norm is folded into the first convolution with the statistics of each row's own
frames. Only the stock modules' parameters are used.

Shapes: B utterances, S samples (a multiple of the stride), T frames, N frames of all rows, C channels in, O channels
out, k taps.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from w2v2.data.masking import latent_lengths, least_samples
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
        d_weight = torch.empty(len(third), channels, 3, dtype=x.dtype, device=x.device)
        d_weight[:, :, :2] = (gradient.T @ pairs).unflatten(1, (2, channels)).transpose(1, 2)  # (O, 2 · C) -> (O, C, 2)
        d_weight[:, :, 2] = gradient[:-1].T @ pairs[1:, :channels]
        d_pairs = product(gradient, first_two.T)
        d_pairs[1:, :channels].addmm_(gradient[:-1], third)
        return d_pairs.view(-1, channels), d_weight  # (N/2, 2 · C) -> (N, C)


def _windows(waveforms_BS: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Input windows of the first convolution, (B, S / stride, k): a view."""
    B, S = waveforms_BS.shape
    return F.pad(waveforms_BS, (0, stride)).as_strided((B, S // stride, kernel), (S + stride, stride, 1))


def inside_rows(counts_B: torch.Tensor, size: int) -> torch.Tensor:
    """(B, size) bool: the first slots of each row, as many as it has of its own."""
    return torch.arange(size, device=counts_B.device) < counts_B[:, None]


def _fold_norm(windows: torch.Tensor, num_samples_B: torch.Tensor, layer: nn.Module) -> tuple[torch.Tensor, ...]:
    """First convolution and group norm as one affine map a row: weight (B, C, k) and offset (B, C), in float64.

    A linear map w of windows with mean μ and covariance Σ has the mean wᵀμ and the variance wᵀΣw.
    """
    conv, group_norm = layer.conv, layer.layer_norm
    with torch.no_grad():
        count = latent_lengths(num_samples_B, conv.kernel_size, conv.stride)  # (B,)
        inside = inside_rows(count, windows.shape[1])[..., None]
        u = torch.where(inside, windows.double(), 0.0)  # (B, T, k)
        mean = u.sum(1) / count[:, None]  # (B, k)
        centred = torch.where(inside, u - mean[:, None], 0.0)
        covariance = centred.transpose(1, 2) @ centred / count[:, None, None]  # (B, k, k)
    weight = conv.weight[:, 0].double()  # (C, k)
    variance = torch.einsum("ck,bkl,cl->bc", weight, covariance, weight)
    gain = torch.rsqrt(variance + group_norm.eps) * group_norm.weight.double()  # (B, C)
    folded = gain[:, :, None] * weight  # (B, C, k)
    return folded, group_norm.bias.double() - (folded * mean[:, None]).sum(-1)


def _affine(windows: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """windows (B, T, k) times weight (B, C, k) plus offset (B, C) → (B, T, C) in `dtype`.

    A 16-bit type alone would round the waveform and the folded weights away. So its product is over the high and low
    half of each, [x_hi x_lo x_hi 1 1] · [w_hi w_hi w_lo b_hi b_lo], which carries twice the bits.
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
    """Latent frames (B, T, C) of each row as if it were alone, in autocast's type; past a row's end they are garbage."""
    layers, device = extractor.conv_layers, waveforms_BS.device.type
    first = layers[0]
    kernel, first_stride = first.conv.kernel_size[0], first.conv.stride[0]
    stride = first_stride * 2 ** (len(layers) - 1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else waveforms_BS.dtype
    with torch.autocast(device, enabled=False):
        # 1. The first convolution, with BASE's group norm folded in: (B, S) -> (B, S / first stride, C).
        waveforms_BS = F.pad(waveforms_BS, (0, -waveforms_BS.shape[1] % stride))
        windows = _windows(waveforms_BS, kernel, first_stride)
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            x = first.activation(_affine(windows, *_fold_norm(windows, num_samples_B, first), dtype))
        else:
            B, weight = len(windows), first.conv.weight[None, :, 0]  # (1, C, k)
            bias = weight.new_zeros(weight.shape[:2]) if first.conv.bias is None else first.conv.bias[None]
            x = _activate(_affine(windows, weight.expand(B, -1, -1), bias.expand(B, -1), dtype), first)

        # 2. The others halve the frames: (B · frames, C) -> (B · frames / 2, C).
        B, frames, channels = x.shape
        x = x.reshape(B * frames, channels)
        for layer in layers[1:]:
            weight = layer.conv.weight.to(dtype)  # (O, C, 2 or 3)
            if weight.shape[-1] == 3:
                x = _PairsWithNext.apply(x, weight)
            else:
                x = linear(x.view(len(x) // 2, -1), weight.transpose(1, 2).flatten(1))
            if layer.conv.bias is not None:
                x = x + layer.conv.bias.to(dtype)
            x = _activate(x, layer)
    return x.view(B, -1, x.shape[-1])


def _activate(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Layer norm over the channels, if the layer has one, and activation."""
    return layer.activation(norm(layer.layer_norm, x) if hasattr(layer, "layer_norm") else x)


def stock_features(waveforms_BS: torch.Tensor, num_samples_B: torch.Tensor, extractor: nn.Module) -> torch.Tensor:
    """The same through the stock layers, for configurations that are not flat."""
    x, layers = waveforms_BS[:, None], list(extractor.conv_layers)
    has_group_norm = isinstance(getattr(layers[0], "layer_norm", None), nn.GroupNorm)
    if has_group_norm and not bool((num_samples_B == waveforms_BS.shape[1]).all()):
        # The group norm takes its statistics over each row's own frames.
        first = layers.pop(0)
        x = first.conv(x)  # (B, 1, S) -> (B, C, T)
        count = latent_lengths(num_samples_B, first.conv.kernel_size, first.conv.stride)
        inside, count = inside_rows(count, x.shape[-1])[:, None], count[:, None, None]
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = torch.where(inside, x, 0.0).sum(-1, keepdim=True) / count
        variance = torch.where(inside, x - mean, 0.0).pow(2).sum(-1, keepdim=True) / count
        gain, bias = first.layer_norm.weight[:, None], first.layer_norm.bias[:, None]
        x = (x - mean) * torch.rsqrt(variance + first.layer_norm.eps) * gain + bias
        x = first.activation(torch.where(inside, x, 0.0))
    for layer in layers:
        x = layer(x)
    return x.transpose(1, 2)  # (B, C, T) -> (B, T, C)


def num_frames(config: Wav2Vec2Config, num_samples: int) -> int:
    """Latent frames of so many samples."""
    return int(latent_lengths(torch.tensor(num_samples), config.conv_kernel, config.conv_stride))


def min_samples(config: Wav2Vec2Config) -> int:
    """Samples of a single latent frame: less than that is no input."""
    return least_samples(1, config.conv_kernel, config.conv_stride)


class LoneRowsFeatureEncoder(Wav2Vec2FeatureEncoder):
    """The stock convs, but each row comes out as if alone; stock group norm over time lets padding change all frames."""

    num_samples: torch.Tensor | None = None  # (B,) of the batch at hand; None: no padding

    def __init__(self, config: Wav2Vec2Config):
        super().__init__(config)
        self._features = flat_features if is_flat(config) else stock_features
        self.config = config

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        B, S = input_values.shape
        num_samples = torch.full((B,), S, device=input_values.device) if self.num_samples is None else self.num_samples
        features = self._features(input_values, num_samples, self)
        return features[:, : num_frames(self.config, S)].transpose(1, 2)  # (B, T, C) -> (B, C, T)


def hide_padding(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's output for an utterance independent of its neighbours in the batch, in training and evaluation.

    Weights, keys and class stay stock. A batch too short for one mask span goes unmasked; the stock model would raise.
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
    shape = len(input_values), num_frames(base.config, input_values.shape[1])
    if base.training and base.config.mask_time_prob > 0 and shape[1] < base.config.mask_time_length:
        kwargs["mask_time_indices"] = torch.zeros(shape, dtype=torch.bool, device=input_values.device)
    return args, kwargs

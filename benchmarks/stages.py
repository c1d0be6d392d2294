"""Where the time of one micro-batch goes: each stage of the model by itself, forward and backward, on equal lengths."""

import time
from collections.abc import Callable

import torch

from w2v2.data.audio import SAMPLING_RATE
from w2v2.model.transformer import linear, norm, positional

REPEATS = 3


def stage_table(contender, work) -> dict[str, float]:
    """Stage → µs for each second of audio, median of a few. The head (quantizer, contrast) is what the whole has beyond the others."""
    contender.prepare(work, 0)
    stages, seconds = contender.stages(), contender.micro_batch_samples() / SAMPLING_RATE
    table = {name: _median_time(contender, function) * 1e6 / seconds for name, function in stages.items()}
    table["head"] = table["whole"] - sum(table[name] for name in ("convs", "projection", "positional", "layers"))
    return table


def _median_time(contender, function: Callable[[], torch.Tensor]) -> float:
    """Seconds of `function` and of the backward pass from what it returns (None: there is no such pass)."""
    found = []
    for _ in range(REPEATS + 1):
        synchronize(contender.device)
        started = time.perf_counter()
        with torch.autocast(contender.device.type, torch.bfloat16, enabled=contender.device.type == "cuda"):
            out = function()
        if out is not None:
            out.backward(torch.ones_like(out))
        synchronize(contender.device)
        found.append(time.perf_counter() - started)
        contender.model.zero_grad(set_to_none=out is not None)
    return sorted(found[1:])[REPEATS // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def our_stages(contender, batch) -> dict[str, Callable]:
    """Stages of `PretrainingModel` on one micro-batch, each from inputs of its own."""
    model = contender.accelerator.unwrap_model(contender.model)
    batch, base = batch.to(contender.device), model.wav2vec2
    with (
        torch.no_grad(),
        torch.autocast(contender.device.type, torch.bfloat16, enabled=contender.device.type == "cuda"),
    ):
        features = model._features(batch)
    dtype = features.dtype
    features = features.clone().requires_grad_()
    residual = torch.float32 if model.config.do_stable_layer_norm else dtype
    hidden = (
        torch.randn(*features.shape[:2], model.config.hidden_size, device=contender.device)
        .to(residual)
        .requires_grad_()
    )
    frames = hidden.detach().to(dtype).requires_grad_()
    in_blocks = contender.device.type != "cpu" if model.positional_in_blocks is None else model.positional_in_blocks

    def plain(function):  # the model leaves autocast behind after the convs
        def run():
            with torch.autocast(contender.device.type, enabled=False):
                return function()

        return run

    @plain
    def layers():
        x = hidden.flatten(0, 1)
        for index, module in enumerate(base.encoder.layers):
            x = model._layer(module, x, batch, index, dtype)
        return x

    @plain
    def projection():
        return linear(base.feature_projection.projection, norm(base.feature_projection.layer_norm, features))

    return {
        "convs": lambda: model._features(batch),
        "projection": projection,
        "positional": plain(lambda: positional(base.encoder.pos_conv_embed, frames, in_blocks)),
        "layers": layers,
        "whole": lambda: model(batch).loss,
        "optimizer": contender.step,
    }


def stock_stages(contender, batch, inputs: Callable[[dict], dict]) -> dict[str, Callable]:
    """The same of the stock model; `inputs` makes its masks and negatives."""
    model, base = contender.model, contender.model.wav2vec2
    waveforms = batch["input_values"].to(contender.device)
    with (
        torch.no_grad(),
        torch.autocast(contender.device.type, torch.bfloat16, enabled=contender.device.type == "cuda"),
    ):
        features = base.feature_extractor(waveforms).transpose(1, 2)
        hidden = base.feature_projection(features)[0].float()
    features, hidden = features.clone().requires_grad_(), hidden.clone().requires_grad_()

    def layers():
        x = hidden
        for module in base.encoder.layers:
            x = module(x)
        return x

    return {
        "convs": lambda: base.feature_extractor(waveforms),
        "projection": lambda: base.feature_projection(features)[0],
        "positional": lambda: base.encoder.pos_conv_embed(hidden),
        "layers": layers,
        "whole": lambda: model(**inputs(batch)).loss,
        "optimizer": contender.step,
    }

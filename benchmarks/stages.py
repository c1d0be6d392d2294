"""Where the time of one micro-batch goes: each stage by itself, forward and backward, on equal lengths."""

import statistics
import time
from collections.abc import Callable

import torch

from w2v2.data.audio import SAMPLING_RATE
from w2v2.model.transformer import linear, norm, positional

REPEATS = 3


def stage_table(contender) -> dict[str, float]:
    """Stage → µs for each second of audio, median of a few. The head is the whole less the other stages."""
    contender.prepare("equal", 0)
    seconds = contender.micro_batch_samples() / SAMPLING_RATE
    table = {name: median_time(contender, run) * 1e6 / seconds for name, run in contender.stages().items()}
    table["head"] = table["whole"] - sum(table[name] for name in ("convs", "projection", "positional", "layers"))
    return table


def median_time(contender, run: Callable[[], torch.Tensor | None]) -> float:
    """Seconds of `run` and of the backward pass from what it returns (None: there is no such pass)."""
    found = []
    for _ in range(REPEATS + 1):  # the first warms up
        synchronize(contender.device)
        started = time.perf_counter()
        with autocast(contender.device):
            out = run()
        if out is not None:
            out.backward(torch.ones_like(out))
        synchronize(contender.device)
        found.append(time.perf_counter() - started)
        contender.model.zero_grad(set_to_none=out is not None)
    return statistics.median(found[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def our_stages(contender, batch) -> dict[str, Callable]:
    """Stages of `PretrainingModel`, each from its own inputs. B utterances, T frames, C channels, D width."""
    model, device = contender.accelerator.unwrap_model(contender.model), contender.device
    batch, encoder, projection = batch.to(device), model.wav2vec2.encoder, model.wav2vec2.feature_projection
    with torch.no_grad(), autocast(device):
        features = model._features(batch)  # (B, T, C)
    dtype = features.dtype
    features = features.clone().requires_grad_()
    hidden = torch.randn(*features.shape[:2], model.config.hidden_size, device=device)  # (B, T, D)
    frames = hidden.to(dtype).requires_grad_()
    # The pre-norm residual is float32, the post-norm one of autocast's type.
    hidden = hidden.to(torch.float32 if model.config.do_stable_layer_norm else dtype).requires_grad_()
    in_blocks = device.type != "cpu" if model.positional_in_blocks is None else model.positional_in_blocks

    def run_layers():
        x = hidden.flatten(0, 1)  # (B · T, D)
        for index, module in enumerate(encoder.layers):
            x = model._layer(module, x, batch, index, dtype)
        return x

    def plain(run):  # the model leaves autocast behind after the convs
        return torch.autocast(device.type, enabled=False)(run)

    return {
        "convs": lambda: model._features(batch),
        "projection": plain(lambda: linear(projection.projection, norm(projection.layer_norm, features))),
        "positional": plain(lambda: positional(encoder.pos_conv_embed, frames, in_blocks)),
        "layers": plain(run_layers),
        "whole": lambda: model(batch).loss,
        "optimizer": contender.step,
    }


def stock_stages(contender, batch, inputs: Callable[[dict], dict]) -> dict[str, Callable]:
    """The same of the stock model; `inputs` makes its masks and negatives."""
    model, base = contender.model, contender.model.wav2vec2
    waveforms = batch["input_values"].to(contender.device)
    with torch.no_grad(), autocast(contender.device):
        features = base.feature_extractor(waveforms).transpose(1, 2)
        hidden = base.feature_projection(features)[0].float()
    features, hidden = features.clone().requires_grad_(), hidden.clone().requires_grad_()

    def run_layers():
        x = hidden
        for module in base.encoder.layers:
            x = module(x)
        return x

    return {
        "convs": lambda: base.feature_extractor(waveforms),
        "projection": lambda: base.feature_projection(features)[0],
        "positional": lambda: base.encoder.pos_conv_embed(hidden),
        "layers": run_layers,
        "whole": lambda: model(**inputs(batch)).loss,
        "optimizer": contender.step,
    }

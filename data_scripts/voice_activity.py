"""Where somebody speaks: a recording → how likely each frame is speech (Silero VAD) → utterances.

The weights are those of the package silero-vad, which computes frame by frame. Here all frames of a block are computed
at once, twelve times as fast. The state goes from block to block, so the blocks do not matter, and memory is constant
but for four bytes a frame. Shapes: S samples at 16 kHz, T frames of 512 samples (32 ms).
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import silero_vad
import soxr
import torch
from torch.nn import functional

from w2v2.audio.crops import MAX_PADDING, MAX_SHIFT, check_peak, mix_down
from w2v2.audio.decoding import SAMPLING_RATE, AudioError, open_sound
from w2v2.errors import UserError

FRAME = 512  # samples
CONTEXT = 64  # samples before a frame that the network hears with it


@dataclass(frozen=True)
class Settings:
    """What an utterance is. Threshold and the 0.25 s of speech that count at all are Silero's own defaults."""

    min_seconds: float
    max_seconds: float
    threshold: float  # probability from which on a frame is speech; it ends 0.15 below
    min_silence_seconds: float  # a shorter pause ends no utterance
    pad_seconds: float  # kept before and after, where there is no speech


class SpeechDetector:
    """Silero VAD at 16 kHz: magnitudes of 129 frequencies, four convolutions, an LSTM."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights, self.lstm = weights, torch.nn.LSTM(128, 128)
        names = [f"{kind}_{side}" for kind in ("weight", "bias") for side in ("ih", "hh")]
        self.lstm.load_state_dict({f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in names})

    @torch.inference_mode()
    def find_probabilities(self, blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
        """Blocks of samples, (S,) float32 → the probability that each frame is speech, (T,), and the samples in all."""
        state, context, rest, found, num_samples = None, np.zeros(CONTEXT, np.float32), np.empty(0, np.float32), [], 0
        for block in itertools.chain(blocks, [None]):  # None: the end, where zeros fill the last frame
            if block is None:
                block = np.zeros(-len(rest) % FRAME, np.float32)
            else:
                num_samples += len(block)
            rest = np.concatenate([rest, block])
            whole = len(rest) // FRAME * FRAME
            if whole:
                heard = np.concatenate([context, rest[:whole]])  # (64 + T·512,)
                frames = np.lib.stride_tricks.sliding_window_view(heard, CONTEXT + FRAME)[::FRAME]  # (T, 576)
                probabilities, state = self._forward(torch.from_numpy(frames.copy()), state)
                found.append(probabilities.numpy())
                context, rest = heard[-CONTEXT:], rest[whole:]
        return np.concatenate([np.empty(0, np.float32), *found]), num_samples

    def _forward(self, frames: torch.Tensor, state: tuple | None) -> tuple[torch.Tensor, tuple]:
        weights = self.weights
        x = functional.pad(frames[:, None], (0, CONTEXT), mode="reflect")  # (T, 1, 640)
        x = functional.conv1d(x, weights["stft.forward_basis_buffer"], stride=128)  # (T, 258, 4): real, imaginary
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        for number, stride in enumerate((1, 2, 2, 1)):
            kernel, bias = (weights[f"encoder.{number}.reparam_conv.{name}"] for name in ("weight", "bias"))
            x = functional.conv1d(x, kernel, bias, stride, padding=1).relu()
        x, state = self.lstm(x.squeeze(-1), state)  # (T, 128, 1) → (T, 128)
        x = functional.linear(
            x.relu(), weights["decoder.decoder.2.weight"].squeeze(-1), weights["decoder.decoder.2.bias"]
        )
        return x.sigmoid().squeeze(-1), state


@lru_cache(maxsize=1)
def load_detector() -> SpeechDetector:
    """The detector, after it agreed with the package's own on noise. UserError for a version that computes otherwise."""
    torch.set_num_threads(1)  # processes work beside one another
    model = silero_vad.load_silero_vad()
    noise = np.random.default_rng(0).standard_normal(20 * FRAME).astype(np.float32) * np.float32(0.1)
    with contextlib.suppress(KeyError, RuntimeError):
        detector = SpeechDetector(model._model.state_dict())
        expected = model.audio_forward(torch.from_numpy(noise)[None], SAMPLING_RATE)[0].numpy()
        if np.allclose(detector.find_probabilities([noise])[0], expected, atol=1e-4):
            return detector
    version = silero_vad.__version__
    raise UserError(
        f"silero-vad {version} gives other values than version 6.2.3, which this script follows: pip install silero-vad==6.2.3"
    )


def read_blocks(path: str, channel: int | None, stop: int) -> Iterator[np.ndarray]:
    """A recording from its beginning to about `stop`, (S,) float32 at 16 kHz, one channel or their mean.

    Raises AudioError.
    """
    with open_sound(path) as file:
        if channel is not None and channel >= file.channels:
            raise AudioError(path, f"has {file.channels} channels, and the manifest asks for number {channel + 1}")
        is_resampled = file.rate != SAMPLING_RATE
        resampler = soxr.ResampleStream(file.rate, SAMPLING_RATE, 1, "float32", "HQ") if is_resampled else None
        num_samples = 0
        for block in file.blocks():
            samples = mix_down(block, channel)
            check_peak(path, np.maximum(samples.max(), -samples.min()))
            samples = np.ascontiguousarray(samples)
            samples = resampler.resample_chunk(samples) if resampler else samples
            num_samples += len(samples)
            yield samples
            if num_samples >= stop + FRAME:
                return
        if resampler:
            yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def segment_recording(
    path: str, channel: int | None, extents: Sequence[tuple[int, int]], settings: Settings
) -> list[list | str]:
    """For each part (start and length) of a recording: its utterances as (start, stop), and its samples of short speech.

    Everything is counted in samples at 16 kHz. For a part that cannot be read, the reason stands there.
    """
    last = max(start + num_samples for start, num_samples in extents)
    try:
        probabilities, length = load_detector().find_probabilities(read_blocks(path, channel, last))
    except AudioError as error:
        return [error.reason] * len(extents)
    found = []
    for start, num_samples in extents:
        if (stop := start + num_samples) > length + MAX_SHIFT + MAX_PADDING:  # durations are rounded
            found.append(f"has {length} samples at 16 kHz of {stop} in its manifest: shorter than its manifest says")
        else:
            found.append(list(cut_utterances(probabilities, start, min(stop, length), settings)))
    return found


def cut_utterances(
    probabilities: np.ndarray, start: int, stop: int, settings: Settings
) -> tuple[list[tuple[int, int]], int]:
    """Utterances between two samples of a recording, as (start, stop); and the samples of speech that is too short."""
    least, most = (round(seconds * SAMPLING_RATE) for seconds in (settings.min_seconds, settings.max_seconds))
    first = start // FRAME
    stretches = silero_vad.get_speech_timestamps_from_probs(
        probabilities[first : -(-stop // FRAME)].tolist(),
        threshold=settings.threshold,
        min_silence_duration_ms=settings.min_silence_seconds * 1000,
        speech_pad_ms=settings.pad_seconds * 1000,
        audio_length_samples=stop - first * FRAME,
    )
    found, too_short = [], 0
    for stretch in stretches:
        begin, end = (first * FRAME + int(stretch[name]) for name in ("start", "end"))
        begin, end = max(begin, start), min(end, stop)
        if end - begin < least:
            too_short += max(0, end - begin)
        else:
            found += cut_long(probabilities, begin, end, least, most)
    return found, too_short


def cut_long(probabilities: np.ndarray, start: int, stop: int, least: int, most: int) -> Iterator[tuple[int, int]]:
    """A stretch in parts of `least` to `most` samples, cut in the middle of the least likely frame that allows this.

    Nothing between them is lost. `most` has to be 2 · `least` + FRAME or more, so that there is such a frame.
    """
    while stop - start > most:
        earliest, latest = start + least, min(start + most, stop - least)
        frames = np.arange(-(-(earliest - FRAME // 2) // FRAME), (latest - FRAME // 2) // FRAME + 1)
        likely = probabilities[frames][::-1]  # among equals the last, for parts as long as can be
        cut = int(frames[len(frames) - 1 - likely.argmin()]) * FRAME + FRAME // 2
        yield start, cut
        start = cut
    yield start, stop

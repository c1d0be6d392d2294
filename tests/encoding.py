"""Audio files of any codec, made with PyAV's encoders; and what a whole decode of theirs gives, written apart from ours."""

import contextlib
import io
from pathlib import Path

import av
import numpy as np


class Pipe(io.RawIOBase):
    """Takes what an encoder writes, and cannot go back to fill in a header."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data) -> int:
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()


def encode(path, samples, rate, codec, container=None, piped=False, bit_rate=None, **options) -> str:
    """Write `samples`, (S,) or (S, C) floats, with one of PyAV's encoders; `options` are its and the container's."""
    samples = samples.reshape(len(samples), -1).astype(np.float32)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[samples.shape[1]]
    with contextlib.closing(Pipe(path)) if piped else contextlib.nullcontext(str(path)) as target:
        with av.open(target, "w", format=container, options=options) as out:
            stream = out.add_stream(codec, rate=rate, layout=layout, options=options)
            if bit_rate:
                stream.bit_rate = bit_rate
            out.start_encoding()
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1).copy(), format="flt", layout=layout)
            frame.sample_rate = rate
            context = stream.codec_context
            fit = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size or 1_024)
            for part in [*fit.resample(frame), *fit.resample(None)]:
                out.mux(stream.encode(part))
            out.mux(stream.encode(None))
    return str(path)


def whole(path) -> tuple[np.ndarray, int]:
    """All that FFmpeg decodes, (S, C) float32, and its rate."""
    parts, converter = [], av.AudioResampler(format="flt")
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:  # a tag between joined files
                continue
            for frame in frames:
                channels = frame.layout.nb_channels
                frame.pts = None
                parts += [made.to_ndarray().reshape(-1, channels) for made in converter.resample(frame)]
        return np.concatenate(parts), stream.codec_context.sample_rate

"""Audio files → frames at the file's own rate. Only regular files are opened; only audio formats are recognised.

soundfile (libsndfile) reads what it seeks to the very sample: PCM, float, G.711, ALAC and FLAC. PyAV (FFmpeg) decodes
everything else from its beginning, as its own whole decode does: encoders' delays are cut off, joined files are heard
to their end. Integers are divided by their full scale, floats stay as they are. Shapes: S frames, C channels.
"""

import contextlib
import mmap
import os
import re
from collections.abc import Iterator
from itertools import chain, islice

import av
import numpy as np
import soundfile

from w2v2.audio.files import AudioError, AudioFile, AudioRange, open_regular

SAMPLING_RATE = 16_000
SEEKABLE = {*"PCM_16 PCM_24 PCM_32 PCM_S8 PCM_U8 FLOAT DOUBLE ULAW ALAW ALAC_16 ALAC_20 ALAC_24 ALAC_32".split()}
FITS_INT16 = {*"PCM_16 PCM_S8 PCM_U8 ULAW ALAW ALAC_16 s16 s16p u8 u8p".split()}  # every sample is a 16-bit number
OPTIONS = {  # no playlists, and nothing that names other files or addresses
    "protocol_whitelist": "none",
    "format_whitelist": "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,dtshd,eac3,flac,flv,g722,g723_1,g726,"
    "g726le,g729,gsm,ilbc,ircam,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,ogg,pvf,rm,shn,sox,tak,tta,"
    "truehd,mlp,voc,w64,wav,wv,xwma",
}
COMPRESSED = (b"OggS", b"ID3", b"\xff")  # how Ogg and MP3 files begin
FAILURES = (av.error.FFmpegError, OSError, OverflowError, MemoryError, ValueError)  # of PyAV, and of reading for it
TAGS = (b"ID3", b"TAG", b"APETAGEX")  # between the parts of joined files: no audio
MAX_DAMAGED = 0.01  # share of a file's packets that may fail to decode
MOST_REMEMBERED = 100_000  # FLAC files
_JOINED: dict[tuple[str, int, int], bool] = {}  # path, size and time of change → more than one FLAC stream
STREAM = re.compile(rb"fLaC[\x00\x80]")  # how one begins
CUT_WAV = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)  # in libsndfile's log: claimed, held
UNKNOWN_SIZE = 2**31 - 2**16  # bytes: what streams claim is no less
MAX_FRAMES_PER_BYTE = 1_000  # a header that claims more is not believed
SAMPLING_RATES = range(1_000, 768_001)  # of recordings; margins and filters follow from the rate
BLOCK = 1 << 18  # frames of a block
UNDECODABLE = "is not audio that soundfile or FFmpeg can decode"


class SeekableFile:
    """A file that soundfile reads from any frame on: `num_frames` long, by its header."""

    def __init__(self, path: str, file: soundfile.SoundFile, source: AudioFile):
        self.path, self.file, self.source = path, file, source
        self.rate, self.channels, self.num_frames = file.samplerate, file.channels, file.frames
        self.codec, self.fits_int16 = f"{file.format} {file.subtype}", file.subtype in FITS_INT16

    def read(self, first: int, last: int, dtype: str = "float32") -> np.ndarray:
        """Frames `first` to `last`, (S, C)."""
        at = self.file.tell()
        skipped = first if at == 0 and first < self.rate and self.file.format == "FLAC" else 0  # faster than seeking
        try:
            if at != first - skipped:
                self.file.seek(first)
            frames = self.file.read(skipped + last - first, dtype=dtype, always_2d=True)[skipped:]
        except (soundfile.SoundFileError, RuntimeError) as error:
            where = f"cannot be decoded from {first / self.rate:.2f} s (damaged or truncated)"
            raise AudioError(self.path, f"{where}: {error}") from None
        if len(frames) < last - first:
            raise AudioError(self.path, "holds less audio than its header claims: truncated")
        return frames

    def blocks(self) -> Iterator[np.ndarray]:
        """All frames, (S, C) each, as float32."""
        return (self.read(at, min(at + BLOCK, self.num_frames)) for at in range(0, self.num_frames, BLOCK))

    def check_whole(self) -> None:
        """Raises AudioError for a WAV that was cut short. libsndfile hears what is left as if it were all."""
        found = CUT_WAV.search(self.file.extra_info)
        claimed, held = map(int, found.groups()) if found else (0, 0)
        if held + 1 < claimed < UNKNOWN_SIZE:
            raise AudioError(self.path, f"is cut short: {held:,} of the {claimed:,} bytes of audio are there")

    def is_joined(self) -> bool:
        """Whether further FLAC streams follow: libsndfile hears the first, and seeks to frames of the others."""
        key = self.path, self.source.size, os.fstat(self.source.fileno()).st_mtime_ns
        if key not in _JOINED:  # searched once in a process: a millisecond a minute of audio
            if len(_JOINED) >= MOST_REMEMBERED:
                _JOINED.clear()
            _JOINED[key] = _has_joint(self.source)
        return _JOINED[key]


def _has_joint(source: AudioFile) -> bool:
    before = source.offset % mmap.ALLOCATIONGRANULARITY
    place = {"length": before + source.size, "offset": source.offset - before, "access": mmap.ACCESS_READ}
    with mmap.mmap(source.fileno(), **place) as content:
        return len(STREAM.findall(content, before)) > 1


class DecodedFile:
    """A file that PyAV decodes from its beginning; how long it is (`num_frames` is None) only its end tells."""

    def __init__(self, path: str, file: av.container.InputContainer):
        self.path, self.file, self.stream, self.num_frames = path, file, file.streams.best("audio"), None
        if self.stream is None or self.stream.codec_context is None:
            raise AudioError(path, UNDECODABLE)
        self.stream.codec_context.thread_count = 1
        self._frames = self._decode()
        self._first = next(self._frames, None)
        if self._first is None:
            raise AudioError(path, UNDECODABLE)
        self.rate, self.channels = self._first.sample_rate, self._first.layout.nb_channels
        self.codec = f"{file.format.name.split(',')[0]} {self.stream.codec_context.name}"
        self.fits_int16 = self._first.format.name in FITS_INT16

    def _decode(self) -> Iterator[av.AudioFrame]:
        """Up to 1 % of the packets, those that do not decode, are left out without a line, as FFmpeg does."""
        num_packets = num_damaged = 0
        try:
            for packet in self.file.demux(self.stream):
                num_packets += 1
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError:
                    num_damaged += not bytes(packet).startswith(TAGS)
                    if num_damaged > 1 + MAX_DAMAGED * num_packets:
                        raise AudioError(self.path, "is damaged: its packets do not decode") from None
        except FAILURES as error:
            raise AudioError(self.path, f"cannot be decoded: {error}") from None

    def frames(self) -> Iterator[av.AudioFrame]:
        """All frames, once."""
        for frame in chain([self._first], self._frames):
            if (frame.sample_rate, frame.layout.nb_channels) != (self.rate, self.channels):
                raise AudioError(self.path, "changes its sampling rate or channels midway: split it there")
            yield frame

    def samples(self, frame: av.AudioFrame, dtype: str = "float32") -> np.ndarray:
        """(S, C)"""
        values = frame.to_ndarray()  # planar (C, S), packed (1, S · C)
        values = values.T if frame.format.is_planar else values.reshape(-1, self.channels)
        if values.dtype == np.uint8:
            values = (values.astype(np.int16) - 128) << 8
        if dtype == "float32" and values.dtype.kind == "i":
            return values.astype(np.float32) / np.float32(2.0 ** (8 * values.itemsize - 1))
        return values.astype(dtype, copy=False)

    def decode(self, first: int, last: int, stop: int, dtype: str) -> tuple[np.ndarray, int]:
        """Frames `first` to `last`, (S, C), and how many were decoded: up to `stop`, or all."""
        kept, at = [np.empty((0, self.channels), dtype)], 0
        for frame in self.frames():
            if first < at + frame.samples and at < last:
                kept.append(self.samples(frame, dtype)[max(0, first - at) : last - at])
            at += frame.samples
            if at >= stop:
                break
        return np.concatenate(kept), at

    def blocks(self) -> Iterator[np.ndarray]:
        """All frames, (S, C) each, as float32."""
        frames = self.frames()
        while some := list(islice(frames, 64)):
            yield np.concatenate(list(map(self.samples, some)))


@contextlib.contextmanager
def open_sound(path: str, start: int = 0, stop: int | None = None) -> Iterator[SeekableFile | DecodedFile]:
    """Open to read from `start` to `stop` (in samples at 16 kHz; None: to the end). Raises AudioError.

    `path` may be an address, `PATH:OFFSET:SIZE`: these bytes are heard as a file of them would be. By name, libsndfile
    and FFmpeg would wait for pipes and open URLs: they get an open file.
    """
    with open_regular(path) as source:
        sound = _open_seekable(path, source, start, stop) or _open_decoded(path, source)
        try:
            if sound.rate not in SAMPLING_RATES:
                raise AudioError(path, f"claims {sound.rate} samples a second, which no recording has: it is damaged")
            yield sound
        finally:
            sound.file.close()


def _open_seekable(path: str, source: AudioFile, start: int, stop: int | None) -> SeekableFile | None:
    """None for a file that soundfile does not know, cannot seek exactly, or does not hear to its end."""
    head = source.peek(8)
    if head.startswith(COMPRESSED):
        return None
    if head[:4] == b"RIFF" == source.peek(4, 8 + int.from_bytes(head[4:], "little")):
        raise AudioError(path, "holds several WAV files joined, of which tools hear only the first: join them anew")
    is_range = isinstance(source, AudioRange)  # libsndfile reads these through Python
    try:
        file = soundfile.SoundFile(source if is_range else source.fileno(), closefd=False)
    except soundfile.LibsndfileError:
        return None
    is_told = 0 < file.frames <= MAX_FRAMES_PER_BYTE * source.size  # unknown: 0, or about 2**63
    sound = SeekableFile(path, file, source)
    if is_told and file.subtype in SEEKABLE:
        is_inside = stop is not None and stop * sound.rate <= sound.num_frames * SAMPLING_RATE
        if file.format != "FLAC" or (is_inside and start < SAMPLING_RATE) or not sound.is_joined():
            return sound
    file.close()
    return None


def _open_decoded(path: str, source: AudioFile) -> DecodedFile:
    source.seek(0)
    if isinstance(source, AudioRange):
        source.name = source.find_name()
    try:
        file = av.open(source, options=OPTIONS)
    except FAILURES as error:
        raise AudioError(path, f"{UNDECODABLE}: {getattr(error, 'strerror', None) or error}") from None
    return DecodedFile(path, file)

"""The names of columns, in lower case, whichever toolkit wrote them.

`COLUMNS` name what a row is, `read_name` which part of its file it is.
"""

import re

COLUMNS = {
    "audio": ("audio", "wav", "audio_filepath", "audio_path", "audio_file", "file_name", "filename", "file", "path"),
    "id": ("id", "utt_id", "utterance_id", "key"),
    "channel": ("channel", "channel_id"),
    "text": ("text", "wrd", "words", "transcript", "transcription", "sentence"),
    "speaker": ("speaker", "spk_id", "speaker_id", "client_id"),
    "label": ("label", "emo", "emotion"),
}
LETTERS = "ABCDEFGH"  # of channels: whether a lone 1 counts from 0, no reader could tell
EXTRAS = ("text", "speaker", "label")
OURS = ("id", "audio", "start", "num_samples", "channel", *EXTRAS)
ROLES = {"start": "start begin beg onset offset", "stop": "stop end", "duration": "duration dur length len"}
UNITS = {"s": "s sec secs second seconds", "ms": "ms msec millisecond milliseconds",
         "frames": "frame frames sample samples"}  # fmt: skip
NEUTRAL = "time timestamp at in t n num nb number of index idx position pos segment seg audio clip utt utterance speech"
MEANINGS = {word: kind for kinds in (ROLES, UNITS) for kind, words in kinds.items() for word in words.split()}
WORDS = "|".join(sorted([*MEANINGS, *NEUTRAL.split()], key=len, reverse=True))
LOOKS = "start begin beg onset offset stop end from to t[01] tmin tmax xmin xmax segments".replace(" ", "|")
LOOKS_LIKE_ONE = re.compile(rf"^(?!.*(date|year|month|day)).*(?<![a-z])({LOOKS})(?![a-z])")
RATE_NAMES = ("sample_rate", "sampling_rate", "samplerate", "sr")


def read_name(name: str) -> tuple[str, str] | None:
    """Role (start, stop, duration, frames) and unit (s, ms, frames, or "") that a lower-case column name tells."""
    if not re.fullmatch(rf"(?:(?:{WORDS})[^a-z]*)+", name):
        return None
    meant = [MEANINGS[word] for word in re.findall(WORDS, name) if word in MEANINGS]
    if sorted(meant) == ["duration", "frames"] or (meant == ["frames"] and re.search("frames|samples", name)):
        return "frames", "frames"
    roles, units = [kind for kind in meant if kind in ROLES], [kind for kind in meant if kind in UNITS]
    units = units or ["s" if roles == ["duration"] else ""]
    return (roles[0], units[0]) if len(roles) == len(units) == 1 else None


def may_be_segment(name: str) -> bool:
    return bool(read_name(name) or name in RATE_NAMES or LOOKS_LIKE_ONE.search(name))


def says_place(name: str) -> bool:
    """Whether a column tells which audio a row is, rather than something of it."""
    return may_be_segment(name) or any(name in COLUMNS[kind] for kind in ("audio", "id", "channel"))


def is_own_length(name: str) -> bool:
    """Whether a column beside the audio itself, not a path, tells its length: starts and stops tell of a recording."""
    return name in RATE_NAMES or (read_name(name) or [""])[0] in ("duration", "frames")


def is_known(name: str) -> bool:
    """Whether a column of this lower-case name says something of an utterance."""
    return any(name in aliases for aliases in COLUMNS.values()) or may_be_segment(name)

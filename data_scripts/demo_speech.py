"""What the demo corpus says and how: a small grammar, the voices, the espeak-ng library, a plain microphone."""

import ctypes
import dataclasses
import random
import zlib
from collections.abc import Iterator

import numpy as np
import soxr

from w2v2.audio.crops import SAMPLING_RATE

MIN_WORDS, MAX_WORDS = 3, 14

ACCENTS = "en en-us en-gb-scotland en-gb-x-rp en-gb-x-gbcwmd en-gb-x-gbclan en-us-nyc en-029".split()
TIMBRES = """
    m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 Alex Alicia Andrea Annie Denis Diogo Henrique Hugo Lee Mario Michael Mike
    adam anika aunty belinda benjamin boris caleb david edward2 grandma grandpa ian linda max quincy rob robert steph
    travis victor
""".split()

# Capitals are symbols, everything else is spoken; alternatives are separated by "|".
GRAMMAR = {
    "SENTENCE": "STORY | STORY | STORY LINK STORY | STORY PLACE LINK STORY | COMMAND | COMMAND LINK COMMAND"
    " | WHEN STORY | WHEN STORY LINK STORY | COUNT",
    "STORY": "WHO MOVED | WHO MOVED HOW | WHO MOVED PLACE | WHO DID THING | WHO DID THING PLACE"
    " | WHO GAVE WHO THING | WHO DID NUMBER THINGS",
    "COMMAND": "POLITE TAKE THING | TAKE THING PLACE | POLITE TAKE NUMBER THINGS PLACE | LEAVE DAY | TELL WHO LEAVE",
    "COUNT": "WHO HAS NUMBER THINGS and NUMBER THINGS | there are NUMBER THINGS PLACE",
    "WHO": "the PERSON | the PERSON | a NATURE PERSON | my NATURE PERSON | the ANIMAL | our OLD ANIMAL",
    "PERSON": "farmer | teacher | doctor | sailor | baker | queen | child | brother | sister | neighbour",
    "ANIMAL": "dog | horse | bird | fox | cat | sheep",
    "NATURE": "young | quiet | happy | clever | tired",
    "OLD": "old | young | small | strange",
    "MOVED": "waited | laughed | slept | walked home | sang a song | came back | fell down",
    "HOW": "slowly | quickly | again | alone | together",
    "DID": "found | carried | opened | dropped | painted | wanted | saw | cleaned | lost",
    "HAS": "has | keeps | needs",
    "GAVE": "gave | showed | sold",
    "THING": "the ARTICLE | a LOOK ARTICLE | the LOOK ARTICLE | this ARTICLE",
    "ARTICLE": "book | box | letter | key | lamp | chair | cup | mirror | picture | window | boat | hat",
    "LOOK": "red | blue | green | yellow | heavy | broken | golden | wooden",
    "THINGS": "apples | candles | stones | flowers | shoes | bottles",
    "NUMBER": "one hundred | two | three | four | five | six | seven | eight | nine | ten | twelve",
    "PLACE": "WHERE the SPOT | WHERE the SPOT | on the table | at school",
    "WHERE": "near | behind | beside | under",
    "SPOT": "river | mountain | village | market | kitchen | forest | station | bridge | house | garden",
    "WHEN": "yesterday | last night | in the morning | on DAY | every summer",
    "DAY": "monday | friday | sunday",
    "LINK": "and | and then | because | while | but",
    "POLITE": "please | now",
    "TAKE": "bring me | take | put down | move | look for",
    "LEAVE": "come back | go home | wait for me",
    "TELL": "tell | ask",
}
RULES = {symbol: [rule.split() for rule in rules.split("|")] for symbol, rules in GRAMMAR.items()}


def expand(symbol: str, rng: random.Random) -> list[str]:
    """Words of one random expansion of a symbol of the grammar; a word stands for itself."""
    if symbol not in RULES:
        return [symbol]
    return [word for part in rng.choice(RULES[symbol]) for word in expand(part, rng)]


def sentences(split: str, rng: random.Random) -> Iterator[str]:
    """Endless different sentences of one split, which a sentence's text decides: no sentence is in two splits."""
    seen = set()
    while True:
        words = expand("SENTENCE", rng)
        sentence = " ".join(words)
        its_split = {0: "test", 1: "dev"}.get(zlib.crc32(sentence.encode()) % 8, "train")
        if MIN_WORDS <= len(words) <= MAX_WORDS and sentence not in seen and its_split == split:
            seen.add(sentence)
            yield sentence


@dataclasses.dataclass(frozen=True)
class Voice:
    """One synthetic speaker: what espeak-ng has to be told, and how many seconds it is to speak."""

    speaker: str
    split: str
    espeak_name: str  # accent+timbre
    words_per_minute: int
    pitch: int  # 0 to 99, 50 is the timbre's own
    pitch_range: int  # 0 monotonous to 99 lively
    seconds: float
    seed: str


class Espeak:
    """The few calls of espeak-ng's C interface (speak_lib.h) that are needed; one instance a process."""

    SYNCHRONOUS, DONT_EXIT, UTF8 = 2, 0x8000, 1
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self, library_path: str, data_path: str):
        self.library = ctypes.CDLL(library_path)
        self.sampling_rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data_path.encode(), self.DONT_EXIT)
        if self.sampling_rate <= 0:
            raise RuntimeError(f"espeak-ng could not read its data in {data_path}")
        self.pieces: list[np.ndarray] = []
        # Kept as an attribute: the library holds only a bare pointer to it.
        samples = ctypes.POINTER(ctypes.c_short)
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, samples, ctypes.c_int, ctypes.c_void_p)(self._collect)
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, num_samples, events) -> int:
        if samples and num_samples > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def use(self, voice: Voice):
        if self.library.espeak_SetVoiceByName(voice.espeak_name.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice.espeak_name}")
        settings = {self.RATE: voice.words_per_minute, self.PITCH: voice.pitch, self.RANGE: voice.pitch_range}
        for parameter, value in settings.items():
            self.library.espeak_SetParameter(parameter, value, 0)

    def say(self, text: str) -> np.ndarray:
        """int16 (S,) at `self.sampling_rate`."""
        self.pieces.clear()
        # By default the library seeds its noise from the clock.
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(zlib.crc32(text.encode())))
        data = text.encode() + b"\0"
        status = self.library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, self.UTF8, None, None)
        if status != 0 or not self.pieces:
            raise RuntimeError(f"espeak-ng returned {status} and no audio for {text!r}")
        return np.concatenate(self.pieces)


def record(speech: np.ndarray, sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """From clean int16 speech (S,) to what a microphone might give: int16 at 16 kHz, random pauses, gain and noise."""
    loud = np.flatnonzero(np.abs(speech) > 0.01 * np.abs(speech).max())
    speech = soxr.resample(speech[loud[0] : loud[-1] + 1] / 32768.0, sampling_rate, SAMPLING_RATE)
    pauses = (rng.uniform(0.05, 0.3, size=2) * SAMPLING_RATE).astype(int)
    level = 10 ** (rng.uniform(-14, -2) / 20) / np.abs(speech).max()
    noise_level = np.sqrt(np.mean(speech**2)) * 10 ** (-rng.uniform(20, 40) / 20)
    white = rng.standard_normal(len(speech) + pauses.sum() + 1)
    tilt = rng.uniform(0.0, 0.9)  # 0: white noise, 0.9: dull noise
    noise = (white[1:] + tilt * white[:-1]) / np.sqrt(1 + tilt**2)
    audio = level * (np.pad(speech, tuple(pauses)) + noise_level * noise)
    return np.clip(np.round(audio * 32767), -32768, 32767).astype(np.int16)

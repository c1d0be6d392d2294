"""How a transcript becomes what a model writes: Unicode form, case, punctuation, and what cannot be seen.

Letters stay whole and apart in every script. Nothing is dropped without a count: see `TextRules.count_dropped`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from w2v2.evaluate.scores import CHARACTERS, TOKENS

WORD_DELIMITER = "|"  # the vocabulary's space
CASES = ("auto", "upper", "lower", "turkish_upper", "turkish_lower", "keep")

# Punctuation that belongs to words: apostrophes; Hebrew geresh, gershayim; Myanmar's particles; Catalan l·l, see below.
_KEPT = set("'\u05f3\u05f4\u104c\u104d\u104e\u104f·")
_KEPT_BLOCKS = (range(0x02B0, 0x0300), range(0xA700, 0xA722))  # phonetic modifiers and tone letters, symbols to Unicode
_INSIDE = set("'\u055a\u055b\u055c\u055e\u055f")  # these stand within a word, as Armenian's marks on a vowel do
_APOSTROPHES = "’ʼ＇"
_QUOTES = re.compile(r"(?<=[^\W\d_])[‘‛´`′](?=[^\W\d_])")  # as apostrophes: l´eau
_QUOTED = re.compile(r"(?<![^\W\d_])‘(?:[^‘’]|(?<=[^\W\d_])’(?=[^\W\d_]))*’(?![^\W\d_])")  # ‘don’t go’
_DOT = re.compile(r"(?<![lL])·|·(?![lL])")
_TAGS = re.compile(r"<[^<>\s]{1,30}>|\[[^\[\]\s]{1,30}\]|&[a-z]{2,8};")
_IN_NUMBERS = re.compile(r"(?<=\d)[.,\u066b\u066c](?=\d)")  # 1,000 stays one word

# Marks without a shape: variation selectors, fillers and Khmer's inherent vowels, beside Unicode's classes Cf, Cc, Cs.
_INVISIBLE = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10),
              *range(0xE0100, 0xE01F0)}  # fmt: skip
# A zero width joiner beside a virama makes another letter (Malayalam chillu, Bengali ra-ya, Sinhala conjuncts). All
# others, and Persian's non-joiner, only shape letters that stay what they are; nothing of them is heard.
_VIRAMAS = "".join(c for c in map(chr, range(0x0900, 0x0E00)) if unicodedata.combining(c) == 9)
_JOINER = re.compile(rf"(?<![{_VIRAMAS}])\u200d(?![{_VIRAMAS}])")

_ACCENTED = ("LATIN", "GREEK")  # scripts whose accents can be left out; in others a mark makes another letter
NO_SPACES = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)  # Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han


class _Table(dict):
    """Code point → what stands for it, for `str.translate`; found by a function when it is first met."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __missing__(self, code: int) -> str:
        self[code] = self.function(chr(code))
        return self[code]


def to_upper(letter: str) -> str:
    """The one capital of a letter. Where it has several (ΐ, և) or none in use (Georgian), the letter itself."""
    if "\u1c90" <= letter <= "\u1cbf":  # Georgian's letters for headings
        return letter.lower()
    capital = "ẞ" if letter == "ß" else letter.upper()
    return letter if len(capital) > 1 or "\u1c90" <= capital <= "\u1cbf" else capital


_UPPER = _Table(to_upper)
_BEFORE = {
    "upper": {}, "lower": {ord("İ"): "i"}, "turkish_upper": {ord("i"): "İ"},
    "turkish_lower": {ord("İ"): "i", ord("I"): "ı"},
}  # fmt: skip


def fold_case(text: str, case: str) -> str:
    """All letters in one case; `keep` leaves them. Lower case knows the final sigma."""
    if case == "keep":
        return text
    text = text.translate(_BEFORE[case])
    return text.translate(_UPPER) if case.endswith("upper") else text.lower()


def find_case(texts: Iterable[str]) -> str:
    """What `auto` stands for: capitals where the texts have both cases, else the case that they have.

    Text of which every tenth i, large or small, is a dotless small or a dotted capital one is taken for Turkish
    (Azerbaijani, Tatar).
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(unicodedata.normalize("NFC", text))
    has_upper = any(c != c.lower() for c in counts)
    has_lower = any(c != to_upper(c) and c == c.lower() for c in counts)
    special = counts["ı"] + counts["İ"]
    is_turkish = special * 10 > special + counts["i"] + counts["I"]
    case = "upper" if has_upper else "lower" if has_lower else "keep"
    return f"turkish_{case}" if is_turkish and case != "keep" else case


def lacks_spaces(texts: Iterable[str]) -> bool:
    """Whether the texts are of a script without spaces between words, or have none."""
    has_space, num_letters, num_unspaced = False, 0, 0
    for text in texts:
        has_space |= " " in text.strip()
        num_letters += len(text)
        num_unspaced += len(NO_SPACES.findall(text))
    return num_letters > 0 and (not has_space or 2 * num_unspaced > num_letters)


def count_tags(texts: Iterable[str]) -> Counter[str]:
    """What looks like a mark (<noise>, [laughter], &amp;) rather than like speech: its letters would be learnt."""
    return Counter(tag for text in texts for tag in _TAGS.findall(text))


def describe_unit(unit: str) -> str:
    """A unit as a console shows it; what has no shape of its own by code point and name."""
    if unicodedata.category(unit[0])[0] == "M":
        return f"◌{unit} ({_name(unit)})"
    return unit if unit.isprintable() and not unit.isspace() else _name(unit)


def _name(unit: str) -> str:
    return " ".join(f"U+{ord(c):04X} {unicodedata.name(c, '')}".strip() for c in unit)


def describe_counts(counts: Mapping[str, int], most: int = 20) -> str:
    listed = [f"{describe_unit(unit)} × {count}" for unit, count in Counter(counts).most_common(most)]
    return ", ".join(listed) + (f" and {len(counts) - most} more" if len(counts) > most else "")


@dataclass(frozen=True)
class TextRules:
    """Called with a transcript, gives what the model is to write.

    Characters: NFC, one case (unless `keep`), plain apostrophes, single spaces; punctuation, symbols and invisible
    characters are dropped, but for `keep_characters`. Where punctuation stood between letters a word ends. `|` is
    always dropped: the vocabulary uses it for the space. Tokens are left as they are but for `drop_tokens`.

    Args:
        drop_characters: dropped instead of all punctuation and symbols.
    """

    unit: str = CHARACTERS
    case: str = "upper"
    drop_characters: str | None = None
    keep_characters: str = ""
    fold_accents: bool = False
    fold_compatibility: bool = False
    drop_tokens: tuple[str, ...] = ()

    def __call__(self, text: str) -> str:
        text = self._compose(text)
        if self.unit == TOKENS:
            return " ".join(t for t in text.translate(self._table).split() if not self._drops(t))
        if self.fold_accents:
            text = _fold_accents(text.translate(_BEFORE.get(self.case, {})))  # a Turkish dot is no accent in lower case
        if "\u200d" not in self.keep_characters:
            text = _JOINER.sub("", text)
        text = _IN_NUMBERS.sub(lambda found: self._table[ord(found[0])].strip(), _DOT.sub(" ", text))
        return " ".join(fold_case(text, self.case).translate(self._table).split())

    def count_dropped(self, texts: Iterable[str]) -> Counter[str]:
        """Characters (and tokens) that the rules leave out of these texts, with their counts."""
        counts: Counter[str] = Counter()
        gone: Counter[str] = Counter()
        for text in texts:
            counts.update(composed := self._compose(text))
            if self.unit == TOKENS:
                gone.update(filter(self._drops, composed.split()))
            for c in "\u200d·":  # whether these go depends on their neighbours
                if c in composed:
                    gone[c] += composed.count(c) - self(text).count(c)
        return +gone + Counter({c: n for c, n in counts.items() if not c.isspace() and self._table[ord(c)] != c})

    def _drops(self, token: str) -> bool:
        return token in self.drop_tokens or token == WORD_DELIMITER

    def _compose(self, text: str) -> str:
        if self.unit == CHARACTERS:
            closing = {found.end() - 1 for found in _QUOTED.finditer(text)}
            straight = text.translate(self._apostrophes)  # as long
            text = "".join(text[i] if i in closing else c for i, c in enumerate(straight)) if closing else straight
            text = _QUOTES.sub("'", text)
        return unicodedata.normalize("NFKC" if self.fold_compatibility else "NFC", text)

    @cached_property
    def _apostrophes(self) -> dict[int, str]:
        return {ord(c): "'" for c in _APOSTROPHES if c not in self.keep_characters}

    @cached_property
    def _table(self) -> _Table:
        return _Table(self._replace)

    def _replace(self, c: str) -> str:
        """What stands for a character: itself, nothing, or a space."""
        category = unicodedata.category(c)
        if c in self.keep_characters and c != WORD_DELIMITER or c.isspace() or c == "\u200d":
            return c
        if category in ("Cf", "Cc", "Cs") or ord(c) in _INVISIBLE:
            return ""
        is_mark = category[0] in "PS"
        is_kept = c in _KEPT or any(ord(c) in block for block in _KEPT_BLOCKS)
        is_dropped = is_mark and not is_kept if self.drop_characters is None else c in self.drop_characters
        if self.unit == TOKENS or not is_dropped and c != WORD_DELIMITER:
            return c
        return " " if is_mark and c not in _INSIDE else ""


def _fold_accents(text: str) -> str:
    """Latin and Greek letters without their accents; of Cyrillic the stress alone is one: й and ї are letters."""
    folded, script = [], ""
    for c in text:
        base, *marks = unicodedata.normalize("NFD", c)
        if unicodedata.combining(c):
            if "\u0300" <= c <= "\u036f" and script in (*_ACCENTED, "CYRILLIC"):
                continue
        else:
            script = unicodedata.name(c, "").split(" ")[0]
            c = base if marks and script in _ACCENTED else c
        folded.append(c)
    return "".join(folded)

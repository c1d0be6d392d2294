"""Beam search with an n-gram language model, through flashlight-text (KenLM inside).

It finds the best word sequence by log p(audio) of its best path + lm_weight · log10 p(words) + word_score · words.
Words are those of the language model (or of a lexicon), spelled in the model's characters and closed by `|`. Where the
vocabulary is of tokens (phonemes), so is the language model: there is no lexicon, and no word score.

Shapes: T latent frames, V entries of the vocabulary, K settings.
"""

import copy
import gzip
import mmap
import os
from collections import namedtuple
from collections.abc import Sequence
from itertools import dropwhile, groupby, product, starmap, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from w2v2.errors import UserError, refuse
from w2v2.evaluate.scores import NAMES, RATES, TOKENS
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.ctc_data import SpeechDataset
from w2v2.finetune.normalisation import WORD_DELIMITER
from w2v2.finetune.subsets import draw_order
from w2v2.finetune.text import BLANK, SPECIAL, UNKNOWN, CTCArguments, encode, unit_of

_BINARY = b"mmap lm http://kheafield.com/code"  # how KenLM's files begin
IMPOSSIBLE = -1e4  # a log probability that no beam survives
BEAM_THRESHOLD = 50.0  # hypotheses further behind the best one are dropped
LM_WEIGHTS = (0.5, 1.0, 1.5, 2.0, 3.0)
WORD_SCORES = (-2.0, -1.0, 0.0, 1.0, 2.0)


Setting = namedtuple("Setting", "lm_weight word_score")  # natural logarithms, for a decade of p(words) and for a word


def tuning_grid(unit: str) -> list[Setting]:
    return list(starmap(Setting, product(LM_WEIGHTS, (0.0,) if unit == TOKENS else WORD_SCORES)))


class BeamDecoder:
    """Log probabilities (T, V) of one utterance → for each of K settings, ids of words (or tokens).

    Raises UserError where flashlight-text is missing, the file is no language model, or its alphabet is another.
    """

    def __init__(self, lm: str, vocabulary: dict[str, int], settings: Sequence[Setting], *, beam_size: int = 100,
                 lexicon: str | None = None):  # fmt: skip
        self.lm_path, self.vocabulary, self.beam_size = lm, vocabulary, beam_size
        self.has_tokens = unit_of(vocabulary) == TOKENS
        refuse((not os.path.isfile(lm), f"--lm {lm}: no such file: give an ARPA file or a KenLM binary"))
        known = read_words(lm, None if self.has_tokens else lexicon)
        self.words = choose_words(known, vocabulary, lexicon or lm)
        self.unspelled = 0 if self.has_tokens else len(known) - len(self.words)
        self._load()
        self.use(settings)

    def _load(self) -> None:
        """The language model and, for words, a trie of their spellings."""
        try:
            from flashlight.lib.text.decoder import SmearingMode, Trie
            from flashlight.lib.text.decoder.kenlm import KenLM
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError:
            raise UserError("--lm needs flashlight-text, which is not installed: pip install flashlight-text") from None
        try:
            self._lm = KenLM(self.lm_path, Dictionary(self.words if self.has_tokens else [*self.words, UNKNOWN]))
        except RuntimeError as error:
            reason = " ".join(str(error).split("threw")[-1].split())
            raise UserError(
                f"--lm {self.lm_path}: not an n-gram that KenLM reads ({reason}): give an ARPA file or a KenLM binary"
            ) from None
        if self.has_tokens:
            return
        self._trie = Trie(len(self.vocabulary), self.vocabulary[WORD_DELIMITER])
        start = self._lm.start(False)
        for index, word in enumerate(self.words):
            spelling = [*encode(word, self.vocabulary), self.vocabulary[WORD_DELIMITER]]
            self._trie.insert(spelling, index, self._lm.score(start, index)[1])
        self._trie.smear(SmearingMode.MAX)

    def use(self, settings: Sequence[Setting]) -> None:
        """Decode with these settings from now on."""
        self.settings = list(settings)
        self._decoders = [self._build(setting) for setting in self.settings]

    def _build(self, setting: Setting):
        from flashlight.lib.text import decoder

        blank = self.vocabulary[BLANK]
        shared = dict(beam_size=self.beam_size, beam_size_token=max(self.vocabulary.values()) + 1,
                      beam_threshold=BEAM_THRESHOLD, lm_weight=setting.lm_weight, sil_score=0.0, log_add=False,
                      criterion_type=decoder.CriterionType.CTC)  # fmt: skip
        if self.has_tokens:
            return decoder.LexiconFreeDecoder(decoder.LexiconFreeDecoderOptions(**shared), self._lm, blank, blank, [])
        options = decoder.LexiconDecoderOptions(word_score=setting.word_score, unk_score=-np.inf, **shared)
        silence, unknown = self.vocabulary[WORD_DELIMITER], len(self.words)
        return decoder.LexiconDecoder(options, self._trie, self._lm, silence, blank, unknown, [], False)

    def __call__(self, log_probs: np.ndarray) -> list[list[int]]:
        """Ids of the best hypothesis of each setting, from log probabilities (T, V)."""
        log_probs = np.array(log_probs, dtype=np.float32)
        log_probs[:, self.vocabulary[UNKNOWN]] = IMPOSSIBLE
        if not self.has_tokens:  # a last frame that is certainly `|` closes the last word
            closing = np.full((1, log_probs.shape[1]), IMPOSSIBLE, np.float32)
            closing[0, self.vocabulary[WORD_DELIMITER]] = 0.0
            log_probs = np.concatenate([log_probs, closing])  # (T, V) -> (T + 1, V)
        best = [decoder.decode(log_probs.ctypes.data, *log_probs.shape)[:1] for decoder in self._decoders]
        if not self.has_tokens:
            return [[word for path in paths for word in path.words if word >= 0] for paths in best]
        # The first and the last token of a path stand for its beginning and its end.
        blank = self.vocabulary[BLANK]
        return [
            [token for path in paths for token, _ in groupby(path.tokens[1:-1]) if token != blank] for paths in best
        ]

    def text(self, ids: Sequence[int]) -> str:
        """Words of one hypothesis; negative ids are padding."""
        return " ".join(self.words[i] for i in ids if i >= 0)


def load_decoder(text_args: CTCArguments, vocabulary: dict[str, int], args: FineTuningArguments) -> BeamDecoder | None:
    """The beam search that the flags ask for; made before any training, so that a wrong file shows up at once."""
    if text_args.lm is None:
        return None
    if text_args.tune_lm and not args.list_sources("validation_data"):
        raise UserError("--tune_lm chooses on --validation_data: give it")
    settings = [Setting(text_args.lm_weight, text_args.word_score)]
    options = dict(beam_size=text_args.beam_size, lexicon=text_args.lexicon)
    decoder = BeamDecoder(text_args.lm, vocabulary, settings, **options)
    left = f", {decoder.unspelled} more cannot be spelled" if decoder.unspelled else ""
    args.print_once(f"language model: {text_args.lm}, {len(decoder.words)} words{left}")
    return decoder


def tune_decoder(trainer: Any, data: SpeechDataset, text_args: CTCArguments) -> dict[str, Any]:
    """Search some utterances with every setting of a small grid, and go on with the best. Returns the error rates."""
    unit = unit_of(trainer.vocabulary)
    grid, name = tuning_grid(unit), RATES[unit][0]
    some = copy.copy(data)
    some.table = data.table.select(sorted(draw_order(data.table, text_args.subset_seed)[: text_args.tune_utterances]))
    trainer.decoder.use(grid)
    trainer.predict(some, metric_key_prefix="tuning")
    rates = [trainer.rates(some.table["text"][:], texts)[name] for texts in trainer.beam_texts]
    best = rates.index(min(rates))
    trainer.decoder.use([grid[best]])
    chosen = ", ".join(f"{flag} {value}" for flag, value in grid[best]._asdict().items())
    trainer.args.print_once(
        f"      tuning: {chosen}: {NAMES[name]} {rates[best]:.1%} on {len(some)} validation utterances"
    )
    listed = [setting._asdict() | {name: round(rate, 5)} for setting, rate in zip(grid, rates, strict=True)]
    return {"tuned_on": len(some), "grid": listed}


def read_words(lm: str, lexicon: str | None) -> list[str]:
    """The words that may be recognised: the lexicon's (first field of a line), else those of the language model."""
    try:
        if lexicon is not None:
            lines = Path(lexicon).read_text(encoding="utf-8").splitlines()
            words = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
        else:
            words = _words_of(lm)
    except (OSError, ValueError, IndexError, EOFError) as error:
        raise UserError(f"{lexicon or lm} holds no list of words ({error}): give an ARPA file or a KenLM binary as "
                        "--lm, a text file with a word a line as --lexicon") from None  # fmt: skip
    return [word for word in words if word not in ("", "<UNK>", *SPECIAL)]


def _words_of(path: str) -> list[str]:
    """Unigrams of an n-gram file.

    A KenLM binary ends with its words, each closed by a zero byte, `<unk>` first. In an ARPA file they are the second
    field of each line from `\\1-grams:` to the next section.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[: len(_BINARY)] == _BINARY:
            if (first := content.rfind(b"<unk>\0")) < 0:
                raise ValueError("a KenLM binary without them")
            return content[first:].decode("utf-8", "replace").split("\0")
    with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
        after = dropwhile(lambda line: line != "\\1-grams:", map(str.strip, file))
        if next(after, None) is None:
            raise ValueError("no unigrams")
        return [line.split()[1] for line in takewhile(lambda line: not line.startswith("\\"), after) if line]


def choose_words(words: Sequence[str], vocabulary: dict[str, int], source: str) -> list[str]:
    """The words that the vocabulary can spell; for tokens, all of these by their ids.

    Raises UserError where less than half is common to both: the language model was made for another alphabet.
    """
    units = set(vocabulary) - {*SPECIAL, WORD_DELIMITER}
    if unit_of(vocabulary) == TOKENS:
        missing = sorted(units - set(words))
        refuse((2 * len(missing) > len(units), f"--lm {source}: lacks {len(missing)} of the model's {len(units)} tokens, "
                f"such as {missing[0] if missing else ''!r}: make it from the same tokens"))  # fmt: skip
        return sorted(vocabulary, key=vocabulary.__getitem__)
    kept = [word for word in words if units.issuperset(word)]
    strange = [word for word in words if not units.issuperset(word)]
    refuse((len(kept) < len(strange) or not kept, f"{source}: {len(strange)} of its {len(words)} words, such as "
            f"{strange[0] if strange else ''!r}, have characters that the model does not write (it writes {''.join(sorted(units))[:40]}): "
            "make it from text normalised in the same way (--text_case?)"))  # fmt: skip
    return kept

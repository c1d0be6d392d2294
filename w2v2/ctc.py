"""Text and audio for CTC: normalisation, vocabulary, data set, collator, greedy decoding and error rates.

Connectionist temporal classification (Graves et al. 2006) as in section 3.2 of the wav2vec 2.0 paper: one output a
character, `|` between words, and a blank (`<pad>`, id 0). The vocabulary comes from the training text alone; a character
that only occurs elsewhere is `<unk>` to the loss, and an error to the error rates, whose references stay as written.

Shapes: B utterances, S samples, T latent frames, U characters.
"""

import json
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from w2v2.audio import SAMPLING_RATE, AudioError, probe, read_crop
from w2v2.errors import UserError

BLANK, UNKNOWN, WORD_DELIMITER = "<pad>", "<unk>", "|"
DROPPED_CHARACTERS = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»“”„‚‘…–—'
_TO_SPACE = "-/_–—"  # where one of these is dropped, a word ends
_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'"})
_IGNORED = -100  # what `Wav2Vec2ForCTC` takes for padding in labels
_METRICS = Path(__file__).parent / "evaluation"


def normalize_text(text: str, case: str = "upper", drop_characters: str = DROPPED_CHARACTERS) -> str:
    """Transcript as the model is to write it: NFKC, one case, dropped characters gone, single spaces, plain apostrophes.

    A dropped dash, slash or underscore becomes a space, so that `well-known` stays two words. `|` is always dropped, since the
    vocabulary uses it for the space.
    """
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    text = text.upper() if case == "upper" else text.lower()
    dropped = {character: " " if character in _TO_SPACE else None for character in drop_characters + WORD_DELIMITER}
    return " ".join(text.translate(str.maketrans(dropped)).split())


def build_vocabulary(texts: Iterable[str]) -> dict[str, int]:
    """Character → id, from normalised training text: blank 0, unknown 1, word delimiter 2, then the characters in order."""
    characters = sorted(set().union(*texts) - {" "})
    return {token: i for i, token in enumerate([BLANK, UNKNOWN, WORD_DELIMITER, *characters])}


def unknown_characters(texts: Iterable[str], vocabulary: dict[str, int]) -> dict[str, int]:
    """Characters that the vocabulary lacks, with their counts, commonest first."""
    counts = Counter(character for text in texts for character in text)
    return {c: n for c, n in counts.most_common() if c != " " and c not in vocabulary}


def encode(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Ids of a normalised text, shape (U,)."""
    return [vocabulary.get(WORD_DELIMITER if c == " " else c, vocabulary[UNKNOWN]) for c in text]


def greedy_decode(ids: Iterable[int], vocabulary: dict[str, int]) -> str:
    """Text of the best path: repeats collapsed, then blanks removed; ids (T,), negative ones are padding."""
    token_of = {i: token for token, i in vocabulary.items()}
    best = [token_of[i] for i, _ in groupby(int(i) for i in ids) if i > 0]
    return " ".join("".join(" " if token == WORD_DELIMITER else token for token in best).split())


def frames_needed(labels: Sequence[int]) -> int:
    """Fewest frames that CTC needs for these labels: one each, and a blank between equal neighbours."""
    return len(labels) + sum(a == b for a, b in zip(labels, labels[1:], strict=False))


def make_processor(vocabulary: dict[str, int], feature_extractor: Wav2Vec2FeatureExtractor) -> Wav2Vec2Processor:
    """Feature extractor and tokenizer in one, as `pipeline("automatic-speech-recognition")` wants them."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vocab.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(vocabulary, file, ensure_ascii=False)
        tokenizer = Wav2Vec2CTCTokenizer(
            path,
            bos_token=None,
            eos_token=None,
            unk_token=UNKNOWN,
            pad_token=BLANK,
            word_delimiter_token=WORD_DELIMITER,
        )
    return Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)


@lru_cache
def _metric(name: str):
    import evaluate  # here, because it takes seconds

    return evaluate.load(str(_METRICS / name), keep_in_memory=True)


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """`{"wer": …, "cer": …}` over the whole corpus, as fractions. The empty-reference rule: w2v2/evaluation/wer/wer.py."""
    return {
        name: _metric(name).compute(predictions=list(hypotheses), references=list(references))[name]
        for name in ("wer", "cer")
    }


def word_error_rate(reference: str, hypothesis: str) -> float:
    """WER of a single utterance, whose reference is not empty."""
    import jiwer

    return jiwer.wer(reference, hypothesis)


def prepare_texts(table: Dataset, name: str, case: str, drop_characters: str) -> tuple[Dataset, dict[str, int]]:
    """The utterances that have a transcript, normalised, and how many were dropped by reason.

    Raises UserError where no utterance has one.
    """
    if "text" not in table.column_names:
        raise UserError(f"{name}: no text in this manifest: CTC needs a column `text` (or wrd, transcript, sentence)")
    texts = [normalize_text(text or "", case, drop_characters) for text in table["text"]]
    kept = [row for row, text in enumerate(texts) if text]
    if not kept:
        raise UserError(f"{name}: none of its {len(table)} utterances has a transcript: fill in its column `text`")
    table = table.remove_columns("text").add_column("text", texts).select(kept)
    return table, {"no_text": len(texts) - len(kept)}


def select_trainable(
    table: Dataset,
    vocabulary: dict[str, int],
    num_frames: Callable[[int], int],
    min_seconds: float,
    max_seconds: float | None,
) -> tuple[Dataset, dict[str, int]]:
    """Utterances within the lengths, and long enough for their transcript (CTC's loss is infinite otherwise).

    Returns them and how many were dropped by reason. `num_frames` gives latent frames from samples.
    """
    longest = float("inf") if max_seconds is None else max_seconds
    reasons: Counter[str] = Counter()
    kept = []
    for row, (samples, text) in enumerate(zip(table["num_samples"], table["text"], strict=True)):
        seconds = samples / SAMPLING_RATE
        if seconds < min_seconds:
            reasons["too_short"] += 1
        elif seconds > longest:
            reasons["too_long"] += 1
        elif num_frames(samples) < frames_needed(encode(text, vocabulary)):
            reasons["text_longer_than_audio"] += 1
        else:
            kept.append(row)
    return table.select(kept), dict(reasons)


def longest_first(table: Dataset) -> Dataset:
    """By length, so that evaluation pads little and memory runs out at once, if it does."""
    lengths = table["num_samples"]
    return table.select(sorted(range(len(table)), key=lambda row: -lengths[row]))


def drop_unreadable(table: Dataset, num_threads: int = 16) -> tuple[Dataset, list[dict[str, str]]]:
    """The utterances whose file opens as audio, by its header, and a list of {id, audio, reason} of the others."""
    paths = sorted(set(table["audio"]))
    with ThreadPoolExecutor(num_threads) as threads:
        reasons = dict(zip(paths, threads.map(_why_unreadable, paths), strict=True))
    rows = list(zip(table["id"], table["audio"], strict=True))
    skipped = [{"id": id, "audio": audio, "reason": reasons[audio]} for id, audio in rows if reasons[audio]]
    return table.select([row for row, (_, audio) in enumerate(rows) if not reasons[audio]]), skipped


def _why_unreadable(path: str) -> str | None:
    try:
        probe(path)
    except AudioError as error:
        return error.reason
    return None


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances decoded when they are asked for; nothing is cached.

    An item is {"input_values": (S,) float32, "labels": (U,) ids}. Audio that turns out to be unreadable is appended to
    `skip_log` by whichever worker meets it, one JSON line; in its place comes the next utterance that reads where `substitute`
    (training), else a silence without labels (evaluation: whoever scores leaves out items without labels).
    """

    def __init__(
        self,
        table: Dataset,
        vocabulary: dict[str, int],
        feature_extractor: Wav2Vec2FeatureExtractor,
        *,
        min_samples: int,
        skip_log: str | os.PathLike,
        substitute: bool,
    ):
        self.table, self.vocabulary, self.feature_extractor = table, vocabulary, feature_extractor
        self.min_samples, self.skip_log, self.substitute = min_samples, skip_log, substitute
        self.lengths = list(table["num_samples"])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        for candidate in range(row, row + (len(self) if self.substitute else 1)):
            utterance = self.table[candidate % len(self)]
            try:
                return self._item(self._read(utterance), self._labels(utterance))
            except AudioError as error:
                log_skipped(self.skip_log, [{"id": utterance["id"], "audio": error.path, "reason": error.reason}])
        if self.substitute:
            raise UserError(f"none of the {len(self)} training utterances can be decoded: see {self.skip_log}")
        return self._item(np.zeros(self.min_samples, np.float32), [])

    def _read(self, utterance: dict[str, Any]) -> np.ndarray:
        return read_crop(utterance["audio"], round(utterance["start"] * SAMPLING_RATE), utterance["num_samples"])

    def _labels(self, utterance: dict[str, Any]) -> list[int]:
        return encode(utterance["text"], self.vocabulary)

    def _item(self, samples: np.ndarray, labels: list[int]) -> dict[str, Any]:
        samples = np.pad(samples, (0, max(0, self.min_samples - len(samples))))
        values = self.feature_extractor(samples, sampling_rate=SAMPLING_RATE).input_values[0]
        return {"input_values": np.asarray(values, np.float32), "labels": labels}


def log_skipped(path: str | os.PathLike, entries: Iterable[dict[str, str]]) -> None:
    """Append what is new to `skipped_audio.jsonl`; each line is one write, so that processes do not tear one another's."""
    known = read_skipped(path)
    with open(path, "a", encoding="utf-8") as file:
        for entry in entries:
            if (entry["id"], entry["audio"]) in known:
                continue
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()


def read_skipped(path: str | os.PathLike) -> dict[tuple[str, str], dict[str, str]]:
    """Unreadable utterances met so far, by id and path; several workers may have met the same one."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return {(entry["id"], entry["audio"]): entry for entry in map(json.loads, file)}


def collate_ctc(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items → input_values (B, S) padded with zeros, labels (B, U) padded with -100, attention_mask (B, S) if lengths differ."""
    lengths = torch.tensor([len(item["input_values"]) for item in items])
    input_values = torch.zeros(len(items), int(lengths.max()))
    labels = torch.full((len(items), max(1, *(len(item["labels"]) for item in items))), _IGNORED)
    for row, item in enumerate(items):
        input_values[row, : lengths[row]] = torch.from_numpy(item["input_values"])
        labels[row, : len(item["labels"])] = torch.tensor(item["labels"], dtype=torch.long)
    batch = {"input_values": input_values, "labels": labels}
    if int(lengths.min()) < int(lengths.max()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch

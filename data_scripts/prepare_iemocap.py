"""Make one manifest of IEMOCAP, with the speaker and the session of every utterance.

    python data_scripts/prepare_iemocap.py /data/IEMOCAP_full_release --output data/iemocap.csv

The folder is the one that the archive unpacks to (the corpus comes under a licence from USC): Session1 … Session5, each
with dialog/EmoEvaluation/*.txt, dialog/transcriptions/*.txt and sentences/wav/DIALOGUE/UTTERANCE.wav. The label is the
annotators' majority as the evaluation files have it (ang, hap, exc, sad, neu, fru, fea, sur, dis, oth; xxx: no
majority). A speaker is a session and F or M. The usual four classes are ang, hap with exc, neu and sad: 5,531
utterances.
"""

import re
import sys
from pathlib import Path

from corpus_files import Parser
from corpus_parts import Part, find_root, write_parts

from w2v2.errors import UserError

COLUMNS = ("id", "audio", "duration", "text", "speaker", "session", "label")
SESSIONS = [f"Session{number}" for number in range(1, 6)]
KNOWN = 10_039  # utterances in the full release
_EVALUATION = re.compile(r"^\[[\d.]+ - [\d.]+\]\t(?P<id>\S+)\t(?P<label>[a-z]{3})\t")
_TRANSCRIPT = re.compile(r"^(?P<id>Ses\S+) \[[\d.]+-[\d.]+\]: (?P<text>.*)$")


def read_lines(folder: Path, pattern: re.Pattern) -> list[re.Match]:
    """Matching lines of the folder's .txt files, without hidden files (`._…`, left by the archive)."""
    paths = [path for path in sorted(folder.glob("*.txt")) if not path.name.startswith(".")]
    lines = (line for path in paths for line in path.read_text(encoding="utf-8", errors="ignore").splitlines())
    return [match for match in map(pattern.match, lines) if match]


def session_rows(session: Path) -> list[dict]:
    """Rows of one session, durations aside."""
    evaluations = read_lines(session / "dialog" / "EmoEvaluation", _EVALUATION)
    if not evaluations:
        raise UserError(f"{session / 'dialog' / 'EmoEvaluation'}: holds no evaluation; unpack all of the release")
    transcripts = read_lines(session / "dialog" / "transcriptions", _TRANSCRIPT)
    texts = {match["id"]: match["text"].strip() for match in transcripts}
    rows = []
    for match in evaluations:
        name = match["id"]
        # Ses01F_impro01, F000: the F or M of the turn, not of the dialogue, says who speaks.
        dialogue, _, turn = name.rpartition("_")
        row = {"id": name, "audio": f"{session.name}/sentences/wav/{dialogue}/{name}.wav", "text": texts.get(name, "")}
        rows.append(row | dict(speaker=f"{name[:5]}{turn[0]}", session=session.name[-1], label=match["label"]))
    return rows


def prepare(args) -> None:
    """The whole job. UserError where a session or an utterance is missing."""
    root = find_root(args.folder, SESSIONS, "IEMOCAP_full_release")
    rows = [row for name in SESSIONS for row in session_rows(root / name)]
    write_parts([Part(args.output, root, rows, COLUMNS, KNOWN)], args)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder of the unpacked release")
    parser.add_allow_incomplete()
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())

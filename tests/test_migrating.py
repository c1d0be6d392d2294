"""docs/migrating.md names flags and keys that exist, and its commands are taken."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import Wav2Vec2Config

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.model.loading import build_config

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
FLAGS, FINE_TUNING = ({f.name for f in fields(types)} for types in (PretrainArguments, FineTuningArguments))


@pytest.mark.parametrize("program", SECTIONS)
def test_every_option_has_an_answer(program):
    """A flag, a key, the launcher's, or none with its reason; no option stands twice."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|(.*)\|$", SECTIONS[program], re.MULTILINE)
    assert len(rows) > 20
    for theirs, ours, remark in rows:
        names = re.findall(r"`(.*?)`", ours)
        flags = {name[2:] for name in names if name.startswith("--")}
        keys = {name for name in names if not name.startswith(("--", "accelerate launch --"))}
        assert flags <= FLAGS and keys <= Wav2Vec2Config().to_dict().keys(), theirs
        assert names or (ours == "*none*" and remark.strip()), theirs
        assert set(re.findall(r"--(\w+)", remark)) <= FLAGS | FINE_TUNING, theirs
    options = re.findall(r"`(.*?)`", " ".join(theirs for theirs, _, _ in rows))
    assert len(options) == len(set(options))


@pytest.mark.parametrize("program", SECTIONS)
def test_the_command_is_taken(program, tmp_path, monkeypatch):
    (command,) = re.findall(r"```bash\n(.*?)```", SECTIONS[program], re.DOTALL)
    for text in re.findall(r"```yaml\n(.*?)```", SECTIONS[program], re.DOTALL):
        (tmp_path / "librispeech.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    _, _, flags = command.replace("\\\n", "").partition("pretrain.py")
    (args,) = parse_command_line([PretrainArguments], shlex.split(flags))
    assert build_config(args).num_hidden_layers in (12, 24) and args.list_sources("train_data")

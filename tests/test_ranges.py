"""Every numeric flag of every script has a range; a value outside of it is one line that names the flag, and status 2."""

import argparse
from dataclasses import fields
from typing import get_args, get_type_hints

import build_ngram
import make_demo_corpus
import pack_audio
import prepare_folder
import prepare_iemocap
import prepare_labelled
import prepare_librispeech
import prepare_voxceleb
import pytest
from conftest import error_line

import convert_checkpoint
from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line, run_script
from w2v2.errors import INHERITED, LARGEST, missed_range
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.classifier import ClassificationArguments
from w2v2.finetune.labels import LabelArguments
from w2v2.finetune.text import CTCArguments
from w2v2.probe.arguments import ProbingArguments, VerificationArguments

GIVEN = ["--train_data=a.csv", "--output_dir=run"]
TUNED = [*GIVEN, "--validation_data=b.csv", "--config_name=base", "--use_cpu"]
SCRIPTS = {
    "pretrain": ([PretrainArguments], GIVEN),
    "finetune_ctc": ([CTCArguments, FineTuningArguments], TUNED),
    "finetune_classification": ([LabelArguments, ClassificationArguments], TUNED),
    "probe": ([ProbingArguments], [*GIVEN, "--checkpoints=a", "--folds=speaker"]),
    "verify_speakers": ([VerificationArguments], ["--output_dir=run", "--config_name=base", "--manifest=a.csv"]),
}
PROGRAMS = [convert_checkpoint, pack_audio, build_ngram, make_demo_corpus, prepare_folder, prepare_iemocap,
            prepare_labelled, prepare_librispeech, prepare_voxceleb]  # fmt: skip


def bad_values(limits):
    """NaN, the infinities, and numbers just outside of a range."""
    assert {"min", "above"} & limits.keys(), "no lower bound"
    below = [limits["min"] - 1] if "min" in limits else [limits["above"], limits["above"] - 1]
    above = limits["below"] if "below" in limits else limits.get("max", LARGEST) * 2 + 1
    return [float("nan"), float("inf"), float("-inf"), *below, int(above)]


def assert_refused(capsys, action, name):
    with pytest.raises(SystemExit) as ended:
        run_script(action)
    line = error_line(capsys.readouterr().err)
    assert ended.value.code == 2 and name in line, line


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_numeric_flag_of_a_run_has_a_range(script, capsys):
    types, given = SCRIPTS[script]
    parse_command_line(types, given)
    numbers = [
        (f.name, f.metadata.get("limits") or INHERITED.get(f.name, {}))
        for kind in types
        for f in fields(kind)
        if f.init and {int, float} & {get_type_hints(kind)[f.name], *get_args(get_type_hints(kind)[f.name])}
    ]
    assert len(numbers) >= 5
    for name, limits in numbers:
        for value in bad_values(limits):
            argv = [*given, f"--{name}={value}"]
            assert_refused(capsys, lambda argv=argv: parse_command_line(types, argv), f"--{name}")


@pytest.mark.parametrize("program", PROGRAMS, ids=[program.__name__ for program in PROGRAMS])
def test_every_numeric_flag_of_a_program_has_a_range(program, capsys, monkeypatch):
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: parsers.append(self) or exit())
        with pytest.raises(SystemExit):
            program.main([])
    for action in parsers[0]._actions:
        assert action.type not in (int, float), f"{action.dest} has no range"
        for value in bad_values(action.type.limits) if hasattr(action.type, "limits") else ():
            argv = [f"{action.option_strings[0]}={value}"]
            assert_refused(capsys, lambda argv=argv: program.main(argv), action.option_strings[0])


@pytest.mark.parametrize("flags, named", [
    ("--max_gumbel_temperature=0.4", "--min_gumbel_temperature 0.5"),
    ("--gumbel_temperature_decay=1.00001", "--gumbel_temperature_decay"),
    ("--max_seconds=1", "--min_seconds 2.0"),
    ("--batch_hours=0", "--batch_hours"),
    ("--max_hours=0", "--max_hours"),
])  # fmt: skip
def test_flags_of_pretraining_that_contradict_are_named(flags, named, capsys):
    assert_refused(capsys, lambda: parse_command_line([PretrainArguments], [*GIVEN, flags]), named)


def test_the_ends_of_a_range_belong_to_it_or_not():
    assert [missed_range(value, dict(min=0, below=1)) for value in (0, 0.5)] == [None, None]
    assert missed_range(1, dict(min=0, below=1)) == "less than 1"
    assert [missed_range(value, dict(above=0, max=1)) for value in (0.1, 1)] == [None, None]
    assert missed_range(0, dict(above=0, max=1)) == "greater than 0"

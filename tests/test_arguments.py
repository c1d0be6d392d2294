"""The command line: a YAML file's values, overridden by flags; each slip is one line that names the flag or key."""

import errno
import inspect
import os
import re
import sys
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
import torch
import yaml
from conftest import error_line
from torch.utils.data import DataLoader

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line, run_script
from w2v2.errors import UserError
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.classifier import ClassificationArguments
from w2v2.finetune.labels import LabelArguments
from w2v2.finetune.text import CTCArguments
from w2v2.probe.arguments import ProbingArguments, VerificationArguments

GIVEN = ["--train_data", "train.csv", "--output_dir", "run"]


def parse(*argv, given=GIVEN):
    return parse_command_line([PretrainArguments], [*argv, *given])[0]


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
        return str(path)

    return write


def refusal(*argv, given=GIVEN):
    with pytest.raises(UserError) as caught:
        parse(*argv, given=given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- values


def test_the_defaults_are_base():
    """fairseq's wav2vec2_base_librispeech, in the project's units."""
    base = dict(max_steps=400_000, learning_rate=5e-4, warmup_steps=32_000, lr_scheduler_type="linear", batch_hours=1.6)
    base |= dict(adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-6, weight_decay=0.01, max_grad_norm=0.0)
    base |= dict(crop_seconds=15.38, min_seconds=2.0, mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2)
    base |= dict(feature_grad_mult=0.1, feature_penalty_weight=10.0)
    base |= dict(max_gumbel_temperature=2.0, min_gumbel_temperature=0.5, gumbel_temperature_decay=0.999995)
    args = parse()
    assert args == PretrainArguments(train_data=["train.csv"], output_dir="run")
    assert {name: getattr(args, name) for name in base} == base


def test_the_command_line_overrides_the_file(config):
    path = config("learning_rate: 5e-4\nmax_seconds: 30\nseed: 7\ntrain_data: [a.csv, b.csv]\noutput_dir: run\n")
    args = parse(path, "--max_steps", "200", "--seed=8", given=[])
    assert (args.learning_rate, args.max_steps, args.seed, args.output_dir) == (5e-4, 200, 8, "run")
    assert args.train_data == ["a.csv", "b.csv"] and type(args.max_seconds) is float and type(args.seed) is int
    assert parse(path, "--train_data", "c.csv", given=[]).train_data == ["c.csv"]
    assert parse(path, "--train_data", "c.csv", "d.csv", "--seed", "1", given=[]).train_data == ["c.csv", "d.csv"]
    path = config("validation_data: dev.csv\n")
    assert parse(path).validation_data == ["dev.csv"] and parse(path, "--validation_data=").validation_data == []


@pytest.mark.parametrize("text, value", [("true", True), ("yes", True), ("false", False), ("no", False)])
def test_booleans_of_the_file_and_of_the_command_line(config, text, value):
    path = config(f"gradient_checkpointing: {text}\ndecay_norms_and_biases: {text}\n")
    args = parse(path)
    assert (args.gradient_checkpointing, args.decay_norms_and_biases) == (value, value)
    assert parse(path, "--gradient_checkpointing", str(not value)).gradient_checkpointing is not value
    assert parse("--gradient_checkpointing").gradient_checkpointing is True


def test_an_empty_value_empties_a_flag_that_can_be_empty(config):
    @dataclass
    class Optional:
        limit: float | None = field(default=35.0)
        names: list[str] = field(default_factory=lambda: ["tensorboard"])

    path = config("limit: null\nnames: []\n")
    (args,) = parse_command_line([Optional], [path])
    assert args.limit is None and args.names == []
    (args,) = parse_command_line([Optional], [path, "--limit", "2", "--names", "x"])
    assert args.limit == 2.0 and args.names == ["x"]


def test_values_that_begin_with_a_minus_or_hold_spaces_survive(config):
    args = parse(config({"output_dir": "my runs/-a", "config_overrides": "-x=1 2"}), given=["--train_data", "a b.csv"])
    assert (args.output_dir, args.config_overrides, args.train_data) == ("my runs/-a", "-x=1 2", ["a b.csv"])


def test_resolved_flags_as_yaml_parse_to_the_same_run(config):
    args = parse("--max_seconds", "20", "--validation_data", "a", "b", "--adam_epsilon", "1e-7", "--dry_run")
    assert parse(config(yaml.safe_dump(vars(args), sort_keys=False)), given=[]) == args


# -- slips


@pytest.mark.parametrize("wrong, nearest", [("lerning_rate", "learning_rate"), ("batch_hour", "batch_hours"),
                                            ("train_dat", "train_data"), ("zzqx", None)])  # fmt: skip
def test_an_unknown_name_is_refused_with_the_nearest(config, wrong, nearest):
    path = config(f"{wrong}: 1\n")
    advice = " (did you mean {}?)" if nearest else "; --help lists what there is"
    assert refusal(path) == f"{path}: unknown key {wrong}{advice.format(nearest)}"
    for flag in ([f"--{wrong}", "1"], [f"--{wrong}=1"], [f"--{wrong.replace('_', '-')}", "-1"]):
        assert refusal(*flag) == f"unknown flag {flag[0].split('=')[0]}{advice.format(f'--{nearest}')}"


def test_all_unknown_names_are_refused_at_once(config):
    told = "--lerning_rate (did you mean --learning_rate?), --zzqx, --max-step (did you mean --max_steps?)"
    wrong = ["--lerning_rate", "1", "--zzqx=a", "--seed", "1", "--max-step", "-.5", "--lerning_rate", "2"]
    assert refusal(*wrong) == f"unknown flags {told}; --help lists what there is"
    path = config("sed: 1\nseed: 2\nmax_step: 3\n")
    assert refusal(path) == f"{path}: unknown keys sed (did you mean seed?), max_step (did you mean max_steps?)"


@pytest.mark.parametrize("text, name", [("max_steps: many\n", "max_steps"), ("learning_rate: fast\n", "learning_rate"),
                                        ("max_steps: 1.5\n", "max_steps"), ("dry_run: perhaps\n", "dry_run"),
                                        ("lr_scheduler_type: linaer\n", "lr_scheduler_type")])  # fmt: skip
def test_a_value_of_the_wrong_kind_names_its_flag_and_the_value(config, text, name):
    value = text.split()[1]
    for message in (refusal(config(text)), refusal(f"--{name}", value)):
        assert f"--{name}" in message and value in message.replace("dry_run", "")
        assert name != "lr_scheduler_type" or "cosine" in message and "tri_stage" in message


@pytest.mark.parametrize(("given", "kept"), [("12.5", 12.5), ("200", 200.0), ("auto", None)])
def test_micro_batch_seconds_is_a_number_or_auto(config, given, kept):
    for args in (parse("--micro_batch_seconds", given), parse(config(f"micro_batch_seconds: {given}\n"))):
        assert args.micro_batch_seconds == kept and type(args.micro_batch_seconds) in (float, type(None))
    assert parse(config({"micro_batch_seconds": "auto"}), "--micro_batch_seconds", "8").micro_batch_seconds == 8.0
    assert type(parse().micro_batch_seconds) is float


@pytest.mark.parametrize("given", ["0", "-3", "nan", "inf", "Auto", "lots", ""])
def test_any_other_micro_batch_seconds_is_refused(config, given):
    for message in (refusal(f"--micro_batch_seconds={given}"), refusal(config({"micro_batch_seconds": given}))):
        assert "--micro_batch_seconds" in message and "`auto`" in message


@pytest.mark.parametrize(
    "flags, named",
    [(["--batch_hours", "0"], "--batch_hours is 0"), (["--max_steps", "-1"], "--max_steps is -1"),
     (["--learning_rate", "nan"], "--learning_rate is nan"), (["--max_seconds", "1"], "--max_seconds 1.0"),
     (["--model_name_or_path", "a", "--config_name", "b"], "--config_name"),
     (["--torch_compile", "--fused_kernels"], "--fused_kernels")],
)  # fmt: skip
def test_values_that_make_no_run_are_refused(flags, named):
    assert named in refusal(*flags)


@pytest.mark.parametrize("text, found", [("- a\n- b\n", "a list"), ("just words\n", "a str"), ("a: [1\n", "not valid YAML"),
                                         ("batch_hours: {a: 1}\n", "'batch_hours' holds a mapping"),
                                         ("learning_rate:\n", "'learning_rate' has no value"),
                                         ("learning_rate: []\n", "'learning_rate' has no value")])  # fmt: skip
def test_a_file_that_is_no_list_of_flags_is_refused_by_name(config, text, found):
    path = config(text)
    message = refusal(path)
    assert message.startswith(path) and found in message


def test_a_missing_binary_or_later_file_is_refused(tmp_path):
    assert refusal("none.yaml").startswith(
        "none.yaml: no such configuration file, and none of those shipped: base_libr"
    )
    (tmp_path / "a.wav").write_bytes(bytes(range(256)))
    assert refusal(str(tmp_path / "a.wav")).startswith(f"{tmp_path / 'a.wav'}: not valid YAML")
    assert "the file first" in refusal("--seed", "1", "config.yaml")


# -- the script


def test_help_lists_every_flag_with_a_help_text(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for f in fields(PretrainArguments):
        assert f"--{f.name} " in shown or f"--{f.name}, " in shown, f.name  # Python 3.13 names the value once
        assert len(f.metadata.get("help", "")) > 10, f"{f.name} has no help text"
        assert " ".join(f.metadata["help"].split())[:25] in shown, f.name


SCRIPTS = [(PretrainArguments,), (CTCArguments, FineTuningArguments), (LabelArguments, ClassificationArguments),
           (ProbingArguments,), (VerificationArguments,)]  # fmt: skip


@pytest.mark.parametrize("types", SCRIPTS)
def test_help_has_headings_and_the_librarys_flags_last(capsys, types):
    with pytest.raises(SystemExit):
        parse_command_line(types, ["--help"])
    shown = capsys.readouterr().out
    headings = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    assert len(headings) > 2 and len(set(headings)) == len(headings) and "TrainingArguments" not in str(headings[:-1])
    ours, _, theirs = shown.partition("\nFurther flags of TrainingArguments:\n")
    for name in (f.name for kind in types for f in fields(kind) if f.init):
        owners = [
            owner.__module__ for kind in types for owner in kind.__mro__ if name in inspect.get_annotations(owner)
        ]
        is_ours = any(owner.startswith("w2v2.") for owner in owners)
        assert [bool(re.search(rf"^  --{name}\b", part, re.MULTILINE)) for part in (ours, theirs)] == [
            is_ours,
            not is_ours,
        ]


def end_of(error):
    """How a script ends that meets this error."""

    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code


def test_a_slip_ends_a_script_with_status_2_and_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/pretrain.py"])
    assert end_of(UserError("--seed: no")) == 2
    assert capsys.readouterr().err == "pretrain.py: error: --seed: no\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert end_of(UserError("--seed: no")) == 2
    assert capsys.readouterr().err == "", "one line, not one a process"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_nothing_is_a_line(capsys, number):
    assert end_of(OSError(number, os.strerror(number), "run/plan.json")) == 2
    assert f"run/plan.json: {os.strerror(number)}; free space" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("rank", ["0", "5"])
def test_too_little_memory_of_a_device_is_a_line(capsys, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert end_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee more")) == 2
    line = error_line(capsys.readouterr().err)
    assert "Tried to allocate 20.00 GiB. Use a smaller" in line and "--micro_batch_seconds" in line


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, lambda size: torch.ones(size).numpy()])
@pytest.mark.parametrize("num_workers", [None, 1])
def test_too_little_memory_of_a_machine_is_a_line(capsys, allocate, num_workers):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        if num_workers is None:
            allocate(10**15)
        else:
            list(DataLoader([10**15], num_workers=num_workers, collate_fn=lambda sizes: allocate(sizes[0])))
    assert end_of(caught.value) == 2
    line = error_line(capsys.readouterr().err)
    assert "Out of memory on the CPU: " in line and "allocate" in line and "--eval_micro_batch_seconds" in line


@pytest.mark.parametrize("bug", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "No such file", "run/x")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        end_of(bug)

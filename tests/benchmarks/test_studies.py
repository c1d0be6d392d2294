"""`benchmarks/learning/`: each study runs to its table, keeps what is finished, and its rivals' gradients are right."""

import contextlib
import itertools
import json
import shutil
import sys
from importlib.util import find_spec

import label_efficiency
import numpy as np
import pandas
import pretraining
import pytest
import rivals
import studies
import torch
import train_rival
import yaml
from conftest import NO_DROPOUT, TRAINED, run_here, tiny_config, write_recipe, write_tones
from safetensors.torch import load_file
from transformers import Wav2Vec2ForPreTraining

import finetune_ctc
import pretrain
from w2v2.arguments import PretrainArguments
from w2v2.errors import UserError
from w2v2.train.log import read_metrics

SCRIPTS = {"pretrain.py": pretrain, "finetune_ctc.py": finetune_ctc, "benchmarks/learning/train_rival.py": train_rival}
PRETRAINING = dict(batch_hours=0.003, crop_seconds=2.0, max_steps=3, mask_time_length=5, dataloader_num_workers=0,
                   report_to=["none"], use_cpu=True)  # fmt: skip
LABELLED = dict(train_data="labelled", validation_data="valid", test_data="test")
FINETUNING = dict(max_steps=2, eval_steps=2, save_steps=2, use_cpu=True, per_device_train_batch_size=2, learning_rate=0.01,
                  mask_feature_length=8, min_seconds=0.1, report_to="none", dataloader_num_workers=0)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with recipes of both scripts: tones, and some of them with words."""
    folder = tmp_path_factory.mktemp("studies")
    write_recipe(folder, NO_DROPOUT, **PRETRAINING)
    paths, words = write_tones(folder / "audio", TRAINED), itertools.cycle(["one two", "two", "three one"])
    rows = [dict(audio=path, duration=length, text=next(words)) for path, length in zip(paths, TRAINED, strict=True)]
    pandas.DataFrame(rows[:12]).to_csv(folder / "labelled.csv", index=False)
    pandas.DataFrame(rows[12:15]).to_csv(folder / "valid.csv", index=False)
    pandas.DataFrame(rows[15:]).to_csv(folder / "test.csv", index=False)
    data = {name: [str(folder / f"{file}.csv")] for name, file in LABELLED.items()}
    (folder / "finetune.yaml").write_text(yaml.safe_dump(data | FINETUNING))
    return folder


@pytest.fixture
def study(monkeypatch):
    """Runs a study's `main` with these words; its scripts run in this process."""

    def launch(command, log):
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return run_here(SCRIPTS[command[0]].main, *command[1:])

    def call(module, *words):
        monkeypatch.setattr(studies, "launch", launch)
        monkeypatch.setattr(sys, "argv", ["study", *map(str, words)])
        module.main()

    return call


def read_runs(folder):
    return json.loads((folder / "results.json").read_text())["runs"]


def test_all_loops_are_compared_once(corpus, study, tmp_path, capsys, monkeypatch):
    words = [
        corpus / "config.yaml",
        corpus / "finetune.yaml",
        "--seeds",
        1,
        "--accumulation",
        2,
        "--output_dir",
        tmp_path,
    ]
    study(rivals, *words)
    found = read_runs(tmp_path)
    sides = list(rivals.SIDES.values())[: 4 if find_spec("speechbrain") else 3]
    assert [run["side"] for run in found] == sides and (tmp_path / "rivals.png").stat().st_size > 1000
    assert all(run["cer"] > 0 and 2.5 < run["loss"] < 4 for run in found)
    assert len({run["loss"] for run in found}) == len(found)
    table = capsys.readouterr().out
    assert all(f"{run['loss']:.3f}" in table for run in found)
    study(rivals, *words)
    assert read_runs(tmp_path) == found and "$ python" not in capsys.readouterr().out
    with pytest.raises(UserError, match="another command or recipe made it"):
        study(rivals, *words, "--", "--learning_rate", 0.002)
    shutil.copy(corpus / "config.yaml", tmp_path / "edited.yaml")
    studies.run(tmp_path / "mine", "gone", "pretrain.py", tmp_path / "edited.yaml", "--dry_run")
    (tmp_path / "edited.yaml").write_text((corpus / "config.yaml").read_text() + "weight_decay: 0.5\n")
    with pytest.raises(UserError, match="another command or recipe made it"):
        studies.run(tmp_path / "mine", "gone", "pretrain.py", tmp_path / "edited.yaml", "--dry_run")


def test_labels_are_saved_at_the_rate_that_validates_best(corpus, study, tmp_path, capsys):
    data = {f"--{name}": corpus / f"{file}.csv" for name, file in LABELLED.items()}
    shape = ["--pretrained", corpus / "pretrained", "--config_name", corpus / "model", "--output_dir", tmp_path]
    torch.manual_seed(0)
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(corpus / "pretrained")
    words = [corpus / "finetune.yaml", *itertools.chain(*data.items()), *shape, "--hours", sum(TRAINED[:12]) / 3600]
    study(label_efficiency, *words, "--shares", 1, 0.5, "--learning_rates", 1e-2, 1e-3, "--", "--logging_steps", 1)
    runs = read_runs(tmp_path)
    searched, others = runs[:4], runs[4:]
    best = [min(searched[:2], key=lambda run: run["validation"]), min(searched[2:], key=lambda run: run["validation"])]
    assert [run["rate"] for run in others] == [run["rate"] for run in best]
    assert len(others) == 2 and others[0]["hours"] < 0.7 * searched[0]["hours"]
    assert (tmp_path / "labels.png").stat().st_size > 1000
    _, *rows = capsys.readouterr().out.splitlines()[-5:]
    for row, run in zip(rows, [*best, *others], strict=True):
        assert row.split()[:2] == [f"{run['share']:.0%}", run["start"].split()[0]] and f"{run['cer']:.1%}" in row


STUDIES = """
short: {batch × 2: {batch_hours: x2, max_steps: x0.5, warmup_steps: x0.5}, few: {config_overrides: num_negatives=5}}
hours: {half: {hours: 0.008}, too much: {hours: 1}}
"""


def test_variants_of_a_recipe_are_compared(corpus, study, tmp_path, capsys):
    (corpus / "studies.yaml").write_text(STUDIES)
    words = [corpus / "config.yaml", "--studies", corpus / "studies.yaml", "--seeds", 1, 2, "--output_dir", tmp_path]
    study(pretraining, *words, "--study", "short", "--", "--max_steps", 4)
    runs = read_runs(tmp_path / "short")
    names = ["batch × 2", "few"]
    assert [(run["variant"], run["seed"]) for run in runs] == [(name, seed) for seed in (1, 2) for name in names]
    table = capsys.readouterr().out
    losses = [run["loss"] for run in runs if run["variant"] == "few"]
    assert f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" in table and min(losses) > 2.5  # of 20
    flags = yaml.safe_load((tmp_path / "batch_2_1" / "pretrain_config.yaml").read_text())
    assert (flags["max_steps"], flags["batch_hours"], flags["warmup_steps"]) == (2, 0.006, 2.0)
    assert (tmp_path / "short" / "short.png").stat().st_size > 1000
    study(pretraining, *words, "--study", "hours", "--variants", "half")
    listed = [json.loads(line) for line in (tmp_path / "0.008_hours.jsonl").read_text().splitlines()]
    assert sum(row["num_samples"] for row in listed) / 16_000 == pytest.approx(0.008 * 3600, abs=1.0)
    assert read_metrics(tmp_path / "half_1" / "metrics.jsonl")[-1]["epoch"] > 0
    for given, said in {
        "hours": "holds 0.01 h",
        "shor": "has short, hours",
        "short --variants new": "new: short in",
    }.items():
        with pytest.raises(UserError, match=said):
            study(pretraining, *words, "--study", *given.split())


def rival_flags(corpus, folder, **flags):
    folder.mkdir(exist_ok=True)
    values = yaml.safe_load((corpus / "config.yaml").read_text())
    return PretrainArguments(**values | dict(output_dir=str(folder)) | flags)


def test_a_rival_follows_the_schedules_and_goes_on_where_it_was_cut(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train_rival, "SAVE_STEPS", 2)
    whole, cut = (rival_flags(corpus, tmp_path / name, diversity_delay_steps=2) for name in ("whole", "cut"))
    used, run = [], train_rival.Mended.run

    def watch(self, most=3):
        used.append((self.model.config.diversity_loss_weight, self.optimizer.param_groups[0]["lr"]))
        return run(self) if len(used) <= most else 1 / 0

    monkeypatch.setattr(train_rival.Mended, "run", watch)
    train_rival.train("mended", 2, whole)
    assert used == [(0.0, 0.00025), (0.0, 0.0005), (0.1, 0.00075)]
    used.clear()
    monkeypatch.setattr(train_rival.Mended, "run", lambda self: watch(self, most=2))
    with pytest.raises(ZeroDivisionError):
        train_rival.train("mended", 2, cut)
    assert (tmp_path / "cut" / train_rival.CUT).exists()
    monkeypatch.setattr(train_rival.Mended, "run", run)
    train_rival.train("mended", 2, cut)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("name", ["mended", "shipped"])
def test_which_micro_batches_a_rival_learns_from(name, corpus, tmp_path, monkeypatch):
    """`mended`: from all, each masked frame alike. `shipped`: an earlier gradient is divided once more."""
    side = train_rival.load_side(name, rival_flags(corpus, tmp_path))
    rng = np.random.default_rng(0)
    lengths = [[20_000, 24_000], [30_000]]
    batches = [
        side.inputs(side.collate([rng.uniform(-0.3, 0.3, n).astype(np.float32) for n in some])) for some in lengths
    ]
    side.batches, side.inputs = batches, lambda batch: batch
    torch.manual_seed(1)  # of Gumbel noise
    losses = [side.model(**batch).loss for batch in batches]
    masked = [int(batch["mask_time_indices"].sum()) for batch in batches]
    parameters = [p for p in side.model.parameters() if p.requires_grad]
    first, last = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses)
    exact = {"mended": (first + last) / sum(masked), "shipped": (first / masked[0] + last) / masked[1] / 2}[name]
    found = []
    monkeypatch.setattr(side, "optimizer", torch.optim.SGD(parameters, lr=0.0))
    monkeypatch.setattr(side.optimizer, "step", lambda: found.extend(p.grad.flatten().clone() for p in parameters))
    torch.manual_seed(1)
    side.run()
    assert torch.allclose(torch.cat(found), exact, rtol=1e-3, atol=1e-6 * float(exact.abs().max()))

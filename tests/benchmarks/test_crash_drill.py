"""The drills see what they say they see, fail when something differs, and in small pass."""

import json
from collections import Counter

import crash_drill
import drilled
import numpy as np
import pandas
import pytest
import soak
from common import write_lines
from conftest import make_batch, run_here, tiny_config, write_csv, write_tones
from crash_drill import draw_aims
from drill_runs import Watch, changed_batches, differing_bytes, heard

from w2v2.errors import UserError


def run_script(main, capsys, *flags) -> tuple[int, dict, str]:
    """Exit status, the line of JSON and the line before it."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, flags)))
    lines = capsys.readouterr().out.splitlines()
    return int(end.value.code), json.loads(lines[-1]), lines[-2]


def test_a_kill_leaves_the_undisturbed_bytes(capsys):
    status, found, line = run_script(crash_drill.main, capsys, "--kills", 1, "--max_steps", 16)
    assert line == "1 kills survived, 0 differing bytes"
    assert (status, found["kills"], found["differing_bytes"], found["changed_batches"]) == (0, 1, 0, 0)
    assert sum(found["phases"].values()) == 1 and found["compared_bytes"] > 100_000


@pytest.mark.slow
def test_another_learning_rate_is_found_out(capsys, monkeypatch):
    monkeypatch.setattr(crash_drill, "AUTO", (*crash_drill.AUTO, "--learning_rate", 0.002))
    status, found, line = run_script(crash_drill.main, capsys, "--kills", 1, "--max_steps", 16)
    assert status == 1 and found["differing_bytes"] > 0 and found["changed_batches"] == 0
    assert line == f"1 kills survived, {found['differing_bytes']} differing bytes"


@pytest.mark.slow
def test_other_world_sizes_hear_the_same_batches(capsys):
    status, found, _ = run_script(crash_drill.main, capsys, "--max_steps", 16, "--world_sizes", 1, 2, 1)
    assert (status, found["changed_batches"], found["differing_bytes"]) == (0, 0, 0)
    assert found["compared_batches"] >= 16 and found["largest_loss_difference"] < 1e-3


def test_a_slip_is_one_line(capsys, tmp_path):
    few = str(write_csv(tmp_path / "few.csv", write_tones(tmp_path / "audio", [1.0] * 3), [1.0] * 3))
    cases = {"--kills": ["--kills", "-1"], "/no.csv": ["--manifest", "/no.csv"], "3 utterances": ["--manifest", few]}
    for named, flags in cases.items():
        assert run_here(lambda flags=flags: crash_drill.main(flags)) == 2
        err = capsys.readouterr().err
        assert named in err and err.count("\n") == 1
    assert run_here(lambda: soak.main([])) == 2


def test_kills_are_spread_and_seeded():
    aims = draw_aims(20, 60, 5.0, np.random.default_rng(0))
    assert aims == draw_aims(20, 60, 5.0, np.random.default_rng(0)) != draw_aims(20, 60, 5.0, np.random.default_rng(1))
    phases, steps, _ = zip(*aims, strict=True)
    assert list(steps) == sorted(steps) and steps[0] < 6 and 45 < steps[-1] < 60
    assert set(phases) == {*crash_drill.AIMS, "finish"}


# What a life finds, what it adds, and the phase that it is then in.
LIVES = {
    "start-up": (["checkpoint-4", ".unfinished-checkpoint-8"], [], 0, 0),
    "update": (["checkpoint-4", "checkpoint-8", "checkpoint-12"], [], 13, 10),
    "validation": (["checkpoint-4"], ["checkpoint-8"], 10, 5),
    "save": (["checkpoint-4"], [".unfinished-checkpoint-8"], 8, 5),
    "renamed": (["checkpoint-4", "checkpoint-8"], ["checkpoint-12"], 12, 10),
    "rotation": (["checkpoint-8"], ["checkpoint-12", ".unfinished-deleted-checkpoint-4"], 12, 10),
    "finish": (["checkpoint-12"], ["checkpoint-16"], 16, 16),
}


@pytest.mark.parametrize("phase", LIVES)
def test_phases_are_seen_from_outside(tmp_path, phase):
    before, after, step, evaluated = LIVES[phase]
    for name in before:
        (tmp_path / name).mkdir()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 14, "loss": 1}\n{"step": 15, "lo')
    watch = Watch(tmp_path)
    for name in after:
        (tmp_path / name).mkdir()
    if step:
        records = [{"step": step, "loss": 1}, {"step": evaluated, "eval_loss": 1}]
        metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9')
    assert watch.phases(max_steps=16)[0] == phase
    assert (watch.step, watch.evaluated) == (step, evaluated)


def test_every_differing_byte_is_counted():
    expected = {"a": b"12345", "b": b"", "c": b"123"}
    assert differing_bytes(dict(expected), expected) == {}
    assert differing_bytes({"a": b"1x3y", "b": b"zz"}, expected) == {"a": 3, "b": 2, "c": 3}


def test_ranks_are_heard_together(tmp_path):
    """Updates that a kill left incomplete, on any rank or in any round, do not count."""
    lines = [[(0, 1, "ab"), (1, 2, "c"), (1, 2, "d"), (2, 1, "e")], [(0, 1, "f"), (1, 2, "g"), (1, 2, "")]]
    for rank, rounds in enumerate(lines):
        path = tmp_path / f"rank{rank}.jsonl"
        write_lines(path, [{"update": update, "num_rounds": n, "heard": list(heard)} for update, n, heard in rounds])
        path.write_text(path.read_text() + '{"update": 3, "he')
    found = heard(tmp_path, num_ranks=2)
    assert found == {0: Counter("abf"), 1: Counter("cdg")}
    assert changed_batches([found], {0: Counter("fba"), 1: Counter("cdg")}) == 0
    assert changed_batches([found], {0: Counter("fba"), 1: Counter("cdgg"), 2: Counter("e")}) == 2


def test_digests_are_the_utterances_own():
    config = tiny_config(num_negatives=drilled.NUM_NEGATIVES)
    lengths = [12_000, 9_000, 7_000]

    def digests(lengths, **options):
        return drilled.digests(make_batch(config, lengths, **options))

    together = digests(lengths)
    assert len(set(together)) == 3 and together == [digests(lengths[i : i + 1], first=i)[0] for i in range(3)]
    assert set(together).isdisjoint(digests(lengths, epoch=1) + digests(lengths, seed=1))
    assert digests(lengths, weight=0.0) == []


# -- the soak


@pytest.mark.slow
def test_a_short_soak_samples_everything(capsys):
    status, found, _ = run_script(soak.main, capsys, "--minutes", 0.7, "--interval", 0.5)
    assert status in (0, 1)  # half a minute cannot say what grows
    run = found["run"]
    names = {"open files", "files of batches", "threads", "ms of an update", "MB of checkpoints", "MB of logs"}
    assert run["trends"].keys() == names | {"MB of the main process", "MB of its workers"}
    assert all(trend["mean"] > 0 for trend in run["trends"].values()) and run["updates"] > 20 < run["samples"]


def test_a_slope_is_judged_by_its_error():
    hours, noise = np.linspace(0, 1, 400), np.random.default_rng(0).standard_normal(400)

    def fit(values, *tolerance):
        return soak.fit(pandas.Series(values, index=hours[: len(values)]), *tolerance)

    found = fit(500 + 3 * hours + noise)
    assert found["slope"] == pytest.approx(3, abs=2 * found["error"]) and found["verdict"] == "flat"
    # The textbook's error for 40 medians of ten, whose variance is about π / 2 · 1 / 10.
    assert found["error"] == pytest.approx(np.sqrt(np.pi / 20 / 40 * 12), rel=0.3)
    assert fit(500 + 30 * hours + noise)["verdict"] == "grows"
    assert fit(500 + 10 * hours + 30 * noise)["verdict"] == "open"
    assert fit(20 + 2 * hours, 1.0)["verdict"] == "grows"
    with pytest.raises(UserError, match="--minutes"):
        fit(noise[:2])


def test_resumes_are_compared_with_the_whole_stream(monkeypatch):
    found = soak.resume_often(30, num_updates=20, num_utterances=5_000)
    assert (found["resumes"], found["different"]) == (30, 0) and found["epochs"] >= 2

    class Forgetful(soak.PlanStream):
        """Begins the epoch anew, as a sampler without a position does."""

        def __init__(self, batches, cursor, updates, **cut):
            super().__init__(batches, cursor._replace(position=0), updates, **cut)

    monkeypatch.setattr(soak, "PlanStream", Forgetful)
    assert soak.resume_often(30, num_updates=20, num_utterances=5_000)["different"] > 20

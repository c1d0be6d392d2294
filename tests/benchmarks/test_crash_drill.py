"""The drills: they see what they say they see, fail when something differs, and in small pass."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_batch, tiny_config, write_csv, write_tones

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("benchmarks", "data_scripts")]

import crash_drill  # noqa: E402
import drill_runs  # noqa: E402
import drilled  # noqa: E402
import soak  # noqa: E402
from crash_drill import draw_aims, fell_into  # noqa: E402
from drill_runs import Look, Watch, changed_batches, differing_bytes, heard  # noqa: E402

from w2v2.errors import UserError  # noqa: E402


def drill(capsys, *flags) -> tuple[int, dict, str]:
    status = crash_drill.main(list(map(str, flags)))
    lines = capsys.readouterr().out.splitlines()
    return status, json.loads(lines[-1]), lines[-2]


def test_a_run_killed_twice_leaves_the_bytes_of_an_undisturbed_one(capsys):
    status, found, line = drill(capsys, "--kills", 2, "--max_steps", 16)
    assert line == "2 kills survived, 0 differing bytes"
    assert (status, found["kills"], found["differing_bytes"], found["changed_batches"]) == (0, 2, 0, 0)
    assert sum(found["phases"].values()) == 2 and found["compared_bytes"] > 100_000
    assert {"date", "command", "cpu", "cores", "versions", "seconds"} <= found.keys()


@pytest.mark.slow
def test_a_run_that_goes_on_otherwise_is_found_out(capsys, monkeypatch):
    monkeypatch.setattr(crash_drill, "AUTO", (*crash_drill.AUTO, "--learning_rate", 0.002))
    status, found, line = drill(capsys, "--kills", 1, "--max_steps", 16)
    assert status == 1 and found["differing_bytes"] > 0 and found["changed_batches"] == 0
    assert line == f"1 kills survived, {found['differing_bytes']} differing bytes"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2, 1)])
def test_other_numbers_of_processes_hear_the_same_batches(capsys, sizes):
    status, found, _ = drill(capsys, "--max_steps", 16, "--world_sizes", *sizes)
    assert (status, found["changed_batches"], found["differing_bytes"]) == (0, 0, 0)
    assert found["compared_batches"] >= 16 and found["largest_loss_difference"] < 1e-3


@pytest.mark.slow
def test_a_short_soak_samples_everything(capsys):
    assert soak.main(["--minutes", "0.7", "--interval", "0.5"]) in (0, 1)  # what grows is not for half a minute to say
    run = json.loads(capsys.readouterr().out.splitlines()[-1])["run"]
    names = {"open files", "files of batches", "threads", "ms of an update", "MB of checkpoints", "MB of logs"}
    assert run["trends"].keys() == names | {"MB of the main process", "MB of its workers"}
    assert all(trend["mean"] > 0 for trend in run["trends"].values()) and run["updates"] > 20 < run["samples"]


def test_files_in_which_batches_come_are_counted_apart(tmp_path):
    before = soak.open_files(os.getpid())
    shared = os.memfd_create("batch")
    with open(tmp_path / "log", "w"):
        during = soak.open_files(os.getpid())
    os.close(shared)
    assert {name: during[name] - before[name] for name in before} == {"open files": 1.0, "files of batches": 1.0}
    assert soak.open_files(os.getpid()) == before


def test_a_slip_is_one_line(capsys, tmp_path):
    few = str(write_csv(tmp_path / "few.csv", write_tones(tmp_path / "audio", [1.0] * 3), [1.0] * 3))
    for flags, named in (
        (["--kills", "-1"], "--kills"),
        (["--manifest", "/no.csv"], "/no.csv"),
        (["--manifest", few], "3 utterances"),
    ):
        assert crash_drill.main(flags) == 2
        err = capsys.readouterr().err
        assert named in err and err.count("\n") == 1
    assert soak.main([]) == 2


@pytest.mark.slow
def test_a_run_that_ends_with_an_error_fails_the_drill(capsys, monkeypatch):
    monkeypatch.setitem(drill_runs.RECIPE, "crop_seconds", -1.0)
    assert crash_drill.main(["--kills", "1"]) == 1
    assert "--crop_seconds is -1.0" in capsys.readouterr().out


def test_kills_are_spread_over_the_whole_run_and_the_same_for_a_seed():
    aims = draw_aims(20, 60, 5.0, np.random.default_rng(0))
    assert aims == draw_aims(20, 60, 5.0, np.random.default_rng(0)) != draw_aims(20, 60, 5.0, np.random.default_rng(1))
    steps = [aim.step for aim in aims]
    assert steps == sorted(steps) and steps[0] < 6 and 45 < steps[-1] < 60
    assert {aim.phase for aim in aims} == {*crash_drill.AIMS, "finish"} and aims[-1].phase == "finish"


LOOKS = {
    "start-up": [None],
    "update": [Look(7, 5, (4,), True, False, False), Look(13, 10, (4, 8, 12), False, False, False)],
    "validation": [Look(10, 5, (4, 8), True, False, False)],
    "save": [Look(8, 5, (4,), False, True, False)],
    "renamed": [Look(12, 10, (4, 8, 12), True, False, False)],
    "rotation": [Look(12, 10, (8, 12), True, False, True)],
    "finish": [Look(16, 16, (12, 16), True, False, False)],
}


@pytest.mark.parametrize("phase", LOOKS)
def test_the_phase_of_a_kill_is_told_from_what_it_left(phase):
    assert [fell_into(look, max_steps=16) for look in LOOKS[phase]] == [phase] * len(LOOKS[phase])


def test_what_an_earlier_life_left_is_not_taken_for_the_run(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 4, "loss": 1}\n{"step": 5, "loss": 1}\n{"step": 6, "lo')
    (tmp_path / ".unfinished-checkpoint-8").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    watch = Watch(tmp_path)
    assert watch.look() is None
    os.rmdir(tmp_path / ".unfinished-checkpoint-8")
    (tmp_path / "new").write_text('{"step": 4, "loss": 1}\n')
    os.replace(tmp_path / "new", metrics)
    assert watch.look() == Look(4, 0, (4,), False, False, False)
    with metrics.open("a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": 5, "eval_loss": 1}\n')
    for name in ("checkpoint-12", ".unfinished-checkpoint-16", ".unfinished-deleted-checkpoint-8"):
        (tmp_path / name).mkdir()
    assert watch.look() == Look(5, 5, (4, 12), True, True, True)


def test_every_differing_byte_is_counted():
    expected = {"a": b"12345", "b": b"", "c": b"123"}
    assert differing_bytes(dict(expected), expected) == {}
    assert differing_bytes({"a": b"1x3y", "b": b"zz"}, expected) == {"a": 3, "b": 2, "c": 3}


def test_ranks_are_heard_together_and_what_a_kill_left_incomplete_is_not(tmp_path):
    lines = {0: [(0, ["a", "b"]), (1, ["c"]), (2, ["d"])], 1: [(0, ["e"]), (1, ["f"])]}
    for rank, updates in lines.items():
        text = "".join(json.dumps({"update": n, "heard": digests}) + "\n" for n, digests in updates)
        (tmp_path / f"rank{rank}.jsonl").write_text(text + '{"update": 3, "he')
    found = heard(tmp_path, num_ranks=2)
    assert found == {0: Counter("abe"), 1: Counter("cf")}
    assert changed_batches([found], {0: Counter("eba"), 1: Counter("cf")}) == 0
    assert changed_batches([found], {0: Counter("eba"), 1: Counter("cff"), 2: Counter("d")}) == 2


def test_an_utterances_digest_is_its_own_whatever_stands_beside_it():
    config = tiny_config(num_negatives=drill_runs.MODEL["num_negatives"])
    lengths = [12_000, 9_000, 7_000]
    together = drilled.digests(make_batch(config, lengths))
    alone = [drilled.digests(make_batch(config, lengths[row : row + 1], first=row))[0] for row in range(3)]
    assert together == alone and len(set(together)) == 3
    others = drilled.digests(make_batch(config, lengths, epoch=1)), drilled.digests(make_batch(config, lengths, seed=1))
    assert all(set(together).isdisjoint(other) for other in others)


def test_a_line_is_fitted_as_by_numpy_and_judged_by_its_error():
    rng, hours = np.random.default_rng(0), np.linspace(0, 1, 400)
    noise = rng.standard_normal(400)
    found = soak.fit(hours, 500 + 3 * hours + noise, None)
    x, y = (np.median(column.reshape(40, 10), axis=1) for column in (hours, 500 + 3 * hours + noise))
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0])
    assert found.error == pytest.approx(np.sqrt(np.polyfit(x, y, 1, cov=True)[1][0, 0]))
    assert found.verdict == "flat"
    assert soak.fit(hours, 500 + 30 * hours + noise, None).verdict == "grows"
    assert soak.fit(hours, 500 + 10 * hours + 30 * noise, None).verdict == "open"
    assert soak.fit(hours, 20 + 2 * hours, 1.0).verdict == "grows"
    with pytest.raises(UserError, match="--minutes"):
        soak.fit(hours[:2], noise[:2], None)


def test_resumes_of_the_sampler_are_compared_with_the_uninterrupted_stream(monkeypatch):
    found = soak.resume_often(30, num_updates=20, num_utterances=5_000)
    assert (found["resumes"], found["different"]) == (30, 0) and found["epochs"] >= 2

    class Forgetful(soak.PlanStream):
        """Begins the epoch anew, as a sampler without a position does."""

        def __init__(self, batches, cursor, updates, **cut):
            super().__init__(batches, cursor._replace(position=0), updates, **cut)

    monkeypatch.setattr(soak, "PlanStream", Forgetful)
    assert soak.resume_often(30, num_updates=20, num_utterances=5_000)["different"] > 20

"""A rank that dies, stops, hangs or fails ends the others, in two seconds here, with a line that names it. Two processes with gloo."""

import signal
import time
from pathlib import Path

import pytest
from ranks import Ranks

from w2v2.train.stop import RESUMABLE

TIMEOUT = 2
SCRIPT = Path(__file__).parents[1] / "watched_ranks.py"


def errors(ranks, rank):
    return [line for line in ranks.said(rank).splitlines() if line.startswith("watched_ranks.py: error: ")]


@pytest.mark.parametrize("victim", [1, 0], ids=["another", "the store's host"])
@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_killed_or_stopped_ends_the_other_one_and_is_named(tmp_path, victim, deed):
    other = 1 - victim
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 10_000) as ranks:
        ranks.wait_until(other, "step 15\n")
        ranks.processes[victim].send_signal(deed)
        assert ranks.statuses(other) == [1]
        (line,) = errors(ranks, other)
        assert f"rank {victim} (process {ranks.processes[victim].pid} on " in line and "at update " in line
        assert "gone, stopped or cut off" in line and "Traceback" not in ranks.said(other)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_that_hangs_ends_with_the_others_and_is_named_once(tmp_path, victim):
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 10_000, victim, "hangs") as ranks:
        assert ranks.statuses() == [1, 1]
        (line,) = errors(ranks, 0) + errors(ranks, 1)
        assert (
            f"rank {victim} (process {ranks.processes[victim].pid} on " in line
            and "at update 5, waiting: no step for 2 s" in line
        )


def test_the_error_of_one_rank_is_told_by_the_others(tmp_path):
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 10_000, 1, "fails") as ranks:
        assert ranks.statuses() == [1, 1]
        (line,) = errors(ranks, 0)
        assert f"rank 1 (process {ranks.processes[1].pid} on " in line and "ValueError: a bug of its own" in line
        assert line.isprintable() and "hf_…" in line and "hf_aaa" not in line
        assert "Traceback" in ranks.said(1) and "Traceback" not in ranks.said(0) and not errors(ranks, 1)


def test_the_slip_that_one_rank_finds_is_raised_by_all(tmp_path):
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 10_000, 1, "slips") as ranks:
        assert ranks.statuses() == [1, 1]
        assert [ranks.said(rank).splitlines()[-1] for rank in range(2)] == ["slip: --flag is 3: it has to be 4"] * 2


@pytest.mark.parametrize(
    ("deed", "status", "told"), [("fails", 1, "ValueError: a bug of its own"), ("slips", 2, "--flag is 3")]
)
@pytest.mark.parametrize("victim", [1, 0])
def test_a_failure_ends_the_other_rank_where_no_exchange_fails(tmp_path, victim, deed, status, told):
    """As with NCCL, whose exchanges wait for a rank that is gone."""
    other = 1 - victim
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 10_000, victim, f"{deed} apart") as ranks:
        assert ranks.statuses() == ([1, status] if other else [status, 1])
        if other == 0:
            (line,) = errors(ranks, 0)
            assert told in line and not errors(ranks, 1)
        else:  # what ended rank 0 stands in its own output; whether rank 1 repeats it depends on which of them is there to say so
            assert told in ranks.said(0) and all(told in line for line in errors(ranks, 1))


def test_a_rank_that_was_asked_to_stop_does_not_end_one_that_still_has_to_do(tmp_path):
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 60, 1, "stops apart") as ranks:
        assert ranks.statuses() == [0, RESUMABLE], ranks.said(0) + ranks.said(1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_ranks_whose_last_line_cannot_be_written_end_all_the_same(tmp_path):
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 10_000, 1, "hangs unheard") as ranks:
        assert ranks.statuses() == [1, 1]


def test_ranks_that_are_suspended_together_go_on(tmp_path):
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 40) as ranks:
        ranks.wait_until(0, "step 3\n")
        for process in ranks.processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(2 * TIMEOUT)
        for process in ranks.processes:
            process.send_signal(signal.SIGCONT)
        assert ranks.statuses() == [0, 0], ranks.said(0) + ranks.said(1)


def test_a_rank_that_is_done_is_not_missed(tmp_path):
    with Ranks(tmp_path, SCRIPT, TIMEOUT, 10, 1, "ends early") as ranks:
        assert ranks.statuses() == [0, 0], ranks.said(0) + ranks.said(1)

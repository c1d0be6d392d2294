"""The real program on several processes: launched in every way, killed, restarted by its launcher, on two machines. On
the CPU.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import NOISY, assert_same_run, error_line, run_here, write_recipe
from ranks import (
    ACCELERATE,
    REPOSITORY,
    SECONDS,
    TORCHRUN,
    TWO_PROCESSES,
    Ranks,
    count_records,
    finish,
    free_port,
    log_of,
    run_ranks,
    start_run,
    wait_for_records,
)

import pretrain

ENDLESS = ("--max_steps", 100_000)
AUTO = ("--resume_from_checkpoint", "auto")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of some seconds, as a YAML file."""
    folder = tmp_path_factory.mktemp("devices")
    values = dict(
        batch_hours=0.002, micro_batch_seconds=3.0, max_steps=24, eval_steps=6, save_steps=2, save_total_limit=2
    )
    return write_recipe(folder, NOISY, **values, dataloader_num_workers=0, report_to=["none"], use_cpu=True)


def command(flags, output_dir, *more):
    return ["pretrain.py", flags, "--output_dir", output_dir, *more]


def children(pid):
    """Python processes that `pid` has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def refusal(text):
    """The one line of a script's own by which a rank ends; launchers print lines beside it."""
    (line,) = [line for line in text.splitlines() if line.startswith("pretrain.py: error: ")]
    return line


@pytest.fixture(scope="module")
def two_processes(flags, tmp_path_factory):
    """An uninterrupted run on two processes that nobody launched but the test, as srun does."""
    output_dir = tmp_path_factory.mktemp("runs") / "two"
    run_ranks(output_dir.with_name("logs"), *command(flags, output_dir))
    assert json.loads((output_dir / "plan.json").read_text())["num_processes"] == 2
    return output_dir


def test_one_process_in_the_place_of_two_is_refused(flags, tmp_path):
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "2", "--num_machines", "1"]
    assert start_run(flags, tmp_path / "run", "--dry_run", launcher=launcher).wait(SECONDS) != 0
    assert "started this one alone" in refusal(log_of(tmp_path / "run"))


def test_killed_ranks_resume_to_the_bit(flags, two_processes, tmp_path):
    """The one that is left ends by itself with a line; and both find their optimizer again."""
    output_dir = tmp_path / "run"
    with Ranks(tmp_path / "killed", *command(flags, output_dir)) as ranks:
        ranks.wait_until(0, "step 5/")
        ranks.processes[1].kill()
        assert ranks.statuses(0) == [1]
        assert "another rank has ended" in refusal(ranks.said(0)) and "Traceback" not in ranks.said(0)
    with Ranks(tmp_path / "resumed", *command(flags, output_dir, *AUTO)) as ranks:
        assert ranks.statuses() == [0, 0], ranks.said(0) + ranks.said(1)
        assert "resuming      " in ranks.said(0)
    assert_same_run(output_dir, two_processes)


def test_one_rank_alone_looks_at_files(flags, tmp_path):
    """Another one, whose storage fails just then, would stop alone and leave the others waiting."""
    script = tmp_path / "spoiled.py"
    script.write_text(
        "import os, pretrain; look = pretrain.inspect_some\n"
        "spoil = lambda table: [dict(id=i, audio=i, reason='cannot be opened') for i in table['id']]\n"
        "pretrain.inspect_some = spoil if os.environ['RANK'] == '1' else look\n"
        "pretrain.main()"
    )
    run_ranks(tmp_path / "logs", script, *command(flags, tmp_path / "run", "--max_steps", 1)[1:])


def test_a_second_run_is_kept_out_of_the_folder(flags, tmp_path, capsys):
    output_dir = tmp_path / "run"
    with Ranks(tmp_path / "first", *command(flags, output_dir, *ENDLESS, *AUTO), size=1) as first:
        first.wait_until(0, "step 2/")
        assert run_here(pretrain.main, flags, "--output_dir", output_dir, *ENDLESS, *AUTO) == 2
        line = error_line(capsys.readouterr().err)
        assert f"process {first.processes[0].pid} on {os.uname().nodename}" in line
        assert first.processes[0].poll() is None


def test_a_rank_that_hangs_ends_the_other(flags, tmp_path):
    """Its loader is stopped, as storage that does not answer would stop it."""
    more = (*ENDLESS, "--dataloader_num_workers", 1, "--ddp_timeout", 8)
    with Ranks(tmp_path / "logs", *command(flags, tmp_path / "run", *more)) as ranks:
        ranks.wait_until(0, "step 5/")
        (loader, *_) = children(ranks.processes[1].pid)
        os.kill(loader, signal.SIGSTOP)
        try:
            assert ranks.statuses(0) == [1]
        finally:
            os.kill(loader, signal.SIGKILL)
        line = refusal(ranks.said(0))
        assert "another rank hangs" in line and "--ddp_timeout" in line


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("launcher", [TORCHRUN, TWO_PROCESSES], ids=["torchrun", "accelerate"])
def test_a_launcher_restarts_a_run_whose_rank_died(flags, two_processes, tmp_path, launcher, seed):
    """Killed at any moment. An earlier run is to be overwritten: by the first attempt, and by it alone."""
    chance, output_dir = random.Random(seed), tmp_path / "run"
    (output_dir / "checkpoint-1").mkdir(parents=True)
    launcher = [*launcher[:2], "--max_restarts", "3", *launcher[2:]]
    process = start_run(flags, output_dir, "--overwrite_output_dir", "--dataloader_num_workers", 1, launcher=launcher)
    while len(children(process.pid)) < 2:
        assert process.poll() is None, log_of(output_dir)
        time.sleep(0.01)
    victim, logged = chance.choice(children(process.pid)), chance.randrange(-6, 28)
    if logged > 0:
        wait_for_records(process, output_dir, logged + 1)
    time.sleep(chance.uniform(0, 10 if logged <= 0 else 0.2))
    assert process.poll() is None, log_of(output_dir)
    print(f"killed with {count_records(output_dir)} of {count_records(two_processes)} lines logged")
    os.kill(victim, signal.SIGKILL)
    finish(process, output_dir)
    assert_same_run(output_dir, two_processes)


@pytest.mark.slow
def test_two_machines_are_two_processes(flags, two_processes, tmp_path):
    """Two launches of the shipped configuration, on loopback and on the CPU."""
    values = yaml.safe_load((REPOSITORY / "configs/accelerate/several_nodes.yaml").read_text())
    values |= dict(num_machines=2, num_processes=2, mixed_precision="no", use_cpu=True)
    config, output_dir, machines = tmp_path / "nodes.yaml", tmp_path / "run", []
    config.write_text(yaml.safe_dump(values))
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    for rank in range(2):
        launcher = [*ACCELERATE, "--config_file", config, "--machine_rank", rank, *meeting]
        machines.append(start_run(flags, output_dir, launcher=launcher))
    for machine in machines:
        finish(machine, output_dir)
    assert_same_run(output_dir, two_processes)


@pytest.mark.slow
def test_a_restart_counted_elsewhere_overwrites_nothing(flags, two_processes, tmp_path):
    """Two agents meet by c10d; the worker of the one without rank 0 is killed, so that one counts and the other may
    not.
    """
    address, output_dir, agents = f"127.0.0.1:{free_port()}", tmp_path / "run", []
    meeting = ["--nnodes", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id", "drill"]
    launcher = ["-m", "torch.distributed.run", *meeting, "--nproc_per_node", 1, "--max_restarts", 3]
    (output_dir / "checkpoint-1").mkdir(parents=True)  # an earlier run: the first attempt overwrites it
    for _ in range(2):
        variables = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        agents.append(start_run(flags, output_dir, "--overwrite_output_dir", launcher=launcher, **variables))
    wait_for_records(agents[0], output_dir, 8)
    assert not (output_dir / "checkpoint-1").exists() and list(output_dir.glob("checkpoint-*"))
    workers = [child for agent in agents for child in children(agent.pid)]
    ranks = {dict(v.split("=", 1) for v in environ(pid))["RANK"]: pid for pid in workers}
    os.kill(ranks["1"], signal.SIGKILL)
    for agent in agents:
        finish(agent, output_dir)
    assert "resuming      " in log_of(output_dir)
    assert_same_run(output_dir, two_processes)


def environ(pid):
    return [entry for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry]

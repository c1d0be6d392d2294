"""The real program on several processes: launched in every way, killed, restarted by its launcher, on two machines. On the CPU."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config, write_csv, write_tones
from ranks import REPOSITORY, SECONDS, Ranks, environment, free_port
from safetensors.torch import load_file

from w2v2.train.log import read_metrics

NOISY = dict(hidden_dropout=0.1, attention_dropout=0.1, feat_quantizer_dropout=0.1, layerdrop=0.3)
TIMINGS = ("audio_seconds_per_second", "data_wait_fraction")
ACCELERATE = ["-m", "accelerate.commands.launch"]
TWO = [*ACCELERATE, "--config_file", "configs/accelerate/cpu_2_processes.yaml"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of some seconds, as a YAML file."""
    folder = tmp_path_factory.mktemp("devices")
    seconds = [1.5, 2.0, 2.5, 3.0, 1.2, 2.2, 1.8, 2.8]
    tiny_config(**NOISY).save_pretrained(folder / "model")
    data = str(write_csv(folder / "data.csv", write_tones(folder / "audio", seconds), seconds))
    values = dict(
        train_data=[data],
        validation_data=[data],
        config_name=str(folder / "model"),
        min_seconds=0.5,
        batch_hours=0.002,
        micro_batch_seconds=3.0,
        max_steps=24,
        warmup_steps=4,
        learning_rate=0.001,
        logging_steps=1,
        eval_steps=6,
        save_steps=2,
        save_total_limit=2,
        dataloader_num_workers=0,
        report_to=["none"],
        use_cpu=True,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def command(flags, output_dir, *more, launcher=()):
    return list(map(str, [*launcher, "pretrain.py", flags, "--output_dir", output_dir, *more]))


def launch(flags, output_dir, *more, launcher, **variables):
    """A launcher with its workers, in a session of its own."""
    with open(f"{output_dir}.log", "a") as log:
        words = [sys.executable, *command(flags, output_dir, *more, launcher=launcher)]
        changes = environment(**variables)
        return subprocess.Popen(words, cwd=REPOSITORY, env=changes, stdout=log, stderr=log, start_new_session=True)


def said(output_dir):
    return Path(f"{output_dir}.log").read_text()


def finished(process, output_dir):
    assert process.wait(SECONDS) == 0, said(output_dir)
    return output_dir


def children(pid):
    """Python processes that `pid` has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def assert_same_run(found, expected, exactly=True):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) if exactly else torch.allclose(ours[name], value, atol=1e-5), name
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (found, expected))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in other.keys() - set(TIMINGS):
            assert mine[name] == (other[name] if exactly else pytest.approx(other[name], rel=1e-3, abs=1e-5)), name


@pytest.fixture(scope="module")
def two_processes(flags, tmp_path_factory):
    """An uninterrupted run on two processes that nobody launched but the test, as srun does."""
    output_dir = tmp_path_factory.mktemp("runs") / "two"
    with Ranks(output_dir.with_name("logs"), *command(flags, output_dir)) as ranks:
        assert ranks.statuses() == [0, 0], ranks.said(0) + ranks.said(1)
    assert json.loads((output_dir / "plan.json").read_text())["num_processes"] == 2
    return output_dir


def test_torchrun_starts_ranks_that_know_of_one_another(flags, tmp_path):
    finished(launch(flags, tmp_path / "run", "--dry_run", launcher=TORCHRUN), tmp_path / "run")
    assert json.loads((tmp_path / "run/plan.json").read_text())["num_processes"] == 2
    assert "on each of 2 device(s)" in said(tmp_path / "run")


def test_a_launch_that_starts_one_process_in_the_place_of_two_is_refused(flags, tmp_path):
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "2", "--num_machines", "1"]
    assert launch(flags, tmp_path / "run", "--dry_run", launcher=launcher).wait(SECONDS) != 0
    (line,) = [line for line in said(tmp_path / "run").splitlines() if line.startswith("pretrain.py: error: ")]
    assert "started this one alone" in line and "cpu_2_processes.yaml" in line


def test_ranks_that_were_killed_resume_on_two_processes_to_the_bit(flags, two_processes, tmp_path):
    """The one that is left ends by itself with a line; and both find their optimizer again."""
    output_dir = tmp_path / "run"
    with Ranks(tmp_path / "killed", *command(flags, output_dir)) as ranks:
        ranks.wait_until(0, "step 5/")
        ranks.processes[1].kill()
        assert ranks.statuses(0) == [1]
        (line,) = [line for line in ranks.said(0).splitlines() if line.startswith("pretrain.py: error: ")]
        assert "another rank has ended" in line and "Traceback" not in ranks.said(0)
    with Ranks(tmp_path / "resumed", *command(flags, output_dir, "--resume_from_checkpoint", "auto")) as ranks:
        assert ranks.statuses() == [0, 0], ranks.said(0) + ranks.said(1)
        assert "resuming      " in ranks.said(0)
    assert_same_run(output_dir, two_processes)


def test_a_second_run_is_kept_out_of_the_folder(flags, tmp_path):
    output_dir = tmp_path / "run"
    more = ("--max_steps", 100_000, "--resume_from_checkpoint", "auto")
    with Ranks(tmp_path / "first", *command(flags, output_dir, *more), size=1) as first:
        first.wait_until(0, "step 2/")
        second = launch(flags, output_dir, *more, launcher=())
        assert second.wait(SECONDS) == 2
        assert f"is being written by process {first.processes[0].pid} on {os.uname().nodename}" in said(output_dir)
        assert first.processes[0].poll() is None


def test_a_rank_that_hangs_ends_the_other(flags, tmp_path):
    """Its loader is stopped, as storage that does not answer would stop it."""
    more = ("--max_steps", 100_000, "--dataloader_num_workers", 1, "--ddp_timeout", 8)
    with Ranks(tmp_path / "logs", *command(flags, tmp_path / "run", *more)) as ranks:
        ranks.wait_until(0, "step 5/")
        (loader, *_) = children(ranks.processes[1].pid)
        os.kill(loader, signal.SIGSTOP)
        try:
            assert ranks.statuses(0) == [1]
        finally:
            os.kill(loader, signal.SIGKILL)
        (line,) = [line for line in ranks.said(0).splitlines() if ": error: " in line]
        assert "another rank hangs" in line and "--ddp_timeout" in line


def lines(output_dir):
    """What a run has logged so far."""
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("launcher", [TORCHRUN, TWO], ids=["torchrun", "accelerate"])
def test_a_launcher_restarts_a_run_whose_rank_was_killed_at_any_moment(flags, two_processes, tmp_path, launcher, seed):
    """An earlier run is to be overwritten: by the first attempt, and by it alone."""
    chance, output_dir, restarts = random.Random(seed), tmp_path / "run", ("--max_restarts", "3")
    (output_dir / "checkpoint-1").mkdir(parents=True)
    launcher = [*launcher[:2], *restarts, *launcher[2:]]
    process = launch(flags, output_dir, "--overwrite_output_dir", "--dataloader_num_workers", 1, launcher=launcher)
    while len(children(process.pid)) < 2:
        assert process.poll() is None, said(output_dir)
        time.sleep(0.01)
    victim, logged = chance.choice(children(process.pid)), chance.randrange(-6, 28)
    if logged > 0:
        while not lines(output_dir) > logged and process.poll() is None:
            time.sleep(0.001)
    time.sleep(chance.uniform(0, 10 if logged <= 0 else 0.2))
    assert process.poll() is None, said(output_dir)
    print(f"killed with {lines(output_dir)} of {lines(two_processes)} lines logged")
    os.kill(victim, signal.SIGKILL)
    finished(process, output_dir)
    assert_same_run(output_dir, two_processes)


@pytest.mark.slow
def test_two_machines_are_two_processes(flags, two_processes, tmp_path):
    """Two launches of the shipped configuration, on loopback and on the CPU."""
    values = yaml.safe_load((REPOSITORY / "configs/accelerate/several_nodes.yaml").read_text())
    config = tmp_path / "nodes.yaml"
    config.write_text(
        yaml.safe_dump(values | dict(num_machines=2, num_processes=2, mixed_precision="no", use_cpu=True))
    )
    port, output_dir = free_port(), tmp_path / "run"
    machines = []
    for rank in range(2):
        launcher = [*ACCELERATE, "--config_file", config, "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
        machines.append(launch(flags, output_dir, launcher=[*launcher, "--main_process_port", port]))
    for machine in machines:
        finished(machine, output_dir)
    assert_same_run(output_dir, two_processes)


@pytest.mark.slow
def test_a_restart_that_another_machine_counts_overwrites_nothing(flags, two_processes, tmp_path):
    """Two agents meet by c10d; the worker of the one without rank 0 is killed, so that one counts and the other may not."""
    address, output_dir, agents = f"127.0.0.1:{free_port()}", tmp_path / "run", []
    meeting = ["--nnodes", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id", "drill"]
    launcher = ["-m", "torch.distributed.run", *meeting, "--nproc_per_node", 1, "--max_restarts", 3]
    (output_dir / "checkpoint-1").mkdir(parents=True)  # an earlier run: the first attempt overwrites it
    for _ in range(2):
        variables = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        agents.append(launch(flags, output_dir, "--overwrite_output_dir", launcher=launcher, **variables))
    while lines(output_dir) < 8:
        assert all(agent.poll() is None for agent in agents), said(output_dir)
        time.sleep(0.01)
    assert not (output_dir / "checkpoint-1").exists() and list(output_dir.glob("checkpoint-*"))
    workers = [child for agent in agents for child in children(agent.pid)]
    ranks = {dict(v.split("=", 1) for v in environ(pid))["RANK"]: pid for pid in workers}
    os.kill(ranks["1"], signal.SIGKILL)
    for agent in agents:
        finished(agent, output_dir)
    assert "resuming      " in said(output_dir)
    assert_same_run(output_dir, two_processes)


def environ(pid):
    return [entry for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry]

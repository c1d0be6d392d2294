"""benchmarks/gpu_session.py: its steps are flags of update.py and fit into ten minutes; what they find, on a CPU."""

import multiprocessing
import re
import threading

import gpu_session
import pytest
import recorded_graph
import torch
import torch.nn.functional as F
import update
from gpu_steps import SESSIONS, START, Step, words
from levers import even_and_odd
from test_capture import as_on_a_gpu  # noqa: F401

from w2v2.train import capture

STEPS = [step for steps in SESSIONS.values() for step in steps]
TINY = "--device cpu --config_name small --batch_seconds 12 --micro_batch_seconds 6 --crop_seconds 3"


def test_each_session_should_take_less_than_ten_minutes():
    for steps in SESSIONS.values():
        assert START + sum(step.expected() for step in steps) < 570
    for step in STEPS:
        assert step.expected() > 0 and step.limit() > 2 * step.expected()


@pytest.mark.parametrize("step", [step for step in STEPS if step.way != "script"], ids=lambda step: step.title)
def test_update_understands_every_step(step):
    there, here = (update.parse(words(step, dry_run)) for dry_run in (False, True))
    assert len(there.sides) == 1 or step.way == "levers"
    assert (here.device, here.config_name) == ("cpu", "small") and here.batch_seconds <= 12
    assert not (here.cuda_graph or here.fused_kernels or here.torch_compile)
    assert there.torch_compile == ("compiled" in step.title) and there.cuda_graph == ("--cuda_graph" in step.flags)


def test_a_step_finds_rates_and_stages():
    found = gpu_session.measure_update(f"{TINY} --contenders ours --profile".split())
    median, least, most, memory, mfu, executed = found["row"]
    assert int(least) <= int(median) <= int(most) and float(memory) > 0 and mfu == executed == ""
    assert min(found["stages"].values()) > 0 and {"convs", "layers", "whole"} <= found["stages"].keys()


def test_captured_and_eager_gradients_are_compared(monkeypatch, as_on_a_gpu):  # noqa: F811
    monkeypatch.setattr(capture, "record", recorded_graph.record)
    flags = f"{TINY} --contenders ours --cuda_graph --positional_conv blocks --config_overrides hidden_dropout=0.3"
    text = gpu_session.measure_parity(flags.split())["text"]
    apart = [float(number) for number in re.findall(r"gradient (\S+) of", text)]
    assert len(apart) == 2 and apart[0] == 0.0 and apart[1] < 1e-5, text


def test_even_and_odd_outputs_are_the_convolution():
    x = torch.randn(64, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 12, 3, dtype=torch.float64, requires_grad=True)
    out, *gradients = even_and_odd(x.detach(), weight.detach())
    expected = F.conv1d(x.T[None], weight, stride=2)[0].T
    torch.testing.assert_close(out[:-1], expected)
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, (x, weight), expected.detach())))


def test_a_step_that_fails_is_reported_and_the_next_one_measured():
    here, there = multiprocessing.Pipe()
    threading.Thread(target=gpu_session.work, args=(there,), daemon=True).start()
    here.send(("update", ["--contenders", "ours", "--device", "cpu", "--config_name", "/nowhere"]))
    found, error = here.recv()
    assert found == {} and "UserError" in error and "/nowhere" in error
    here.send(("levers", ["--device", "cpu"]))
    assert here.recv()[1] is None
    here.send(None)


def test_a_step_that_takes_too_long_is_stopped_and_said():
    class Endless:
        is_killed = False

        def kill(self):
            self.is_killed = True

        def join(self):
            pass

    worker = gpu_session.Worker()
    (worker.connection, other), worker.process = multiprocessing.Pipe(), (process := Endless())
    step = Step("endless", "--contenders ours", 1.0)
    found, error = worker.ask(step, [], 0.01)
    assert (found, error) == ({}, "stopped after 0 s") and process.is_killed and worker.process is None
    other.close()

    section = gpu_session.Section("first")
    section.add(step, found, error, 1.0)
    section.add(Step("next", "", 1.0), {"row": ["7", "6", "8"], "stages": {"convs": 1.0}, "text": "more"}, None, 2.0)
    for said in ("| endless | 1 | stopped after 0 s |", "| next | 2 | 7 | 6 | 8 |", "| convs | 1.0 |", "more"):
        assert said in str(section)

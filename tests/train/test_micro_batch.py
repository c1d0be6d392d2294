"""`--micro_batch_seconds auto`: what is tried is the worst case, nothing is left of it, and what is found fits on every
rank.
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import make_batch, tiny_config
from two_ranks import NOISY, settings

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, plan_update
from w2v2.data.collate import Framing, build_batch
from w2v2.errors import UserError
from w2v2.model.pretraining import PretrainingModel
from w2v2.train import micro_batch
from w2v2.train.micro_batch import Trial, fit, largest, worst_case
from w2v2.train.update import build_optimizer

LONGEST, GRID = 320 + 3 * 5120, 5120
OPTIMIZER = SimpleNamespace(
    learning_rate=0.1, adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-6, weight_decay=0.1, decay_norms_and_biases=True
)


def framing(**changes):
    return Framing(tiny_config(**changes), normalize=False)


@pytest.fixture
def trial():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    accelerator = Accelerator(cpu=True)
    config = tiny_config(**NOISY)
    model = PretrainingModel(config).train()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
    return Trial(accelerator, model, optimizer, framing(**NOISY), settings(), LONGEST)


@pytest.fixture
def ends_beyond(trial, monkeypatch):
    """Memory ends in the forward or in the backward pass of more than so many rows; the list of the rows that were
    tried.
    """

    def limit(rows, stage):
        whole, tried = PretrainingModel._context, []

        def context(model, normed, batch):
            hidden = whole(model, normed, batch)
            tried.append(len(batch.rows.lengths))
            if tried[-1] > rows and stage == "forward":
                raise torch.OutOfMemoryError("forward")
            if tried[-1] > rows:
                hidden.register_hook(_out_of_memory)
            return hidden

        monkeypatch.setattr(PretrainingModel, "_context", context)
        return tried

    return limit


def _out_of_memory(gradient):
    raise torch.OutOfMemoryError("backward")


@pytest.fixture(autouse=True)
def device_module(monkeypatch):
    """Stands in for `torch.cuda`: 8 of 10 GB free and 1 GB ours; notes the limits that are set."""
    module = SimpleNamespace(limits=[], mem_get_info=lambda _: (8e9, 10e9), memory_reserved=lambda _: 1e9)
    module.current_device, module.empty_cache = lambda: 3, lambda: None

    def limit(fraction, device):
        assert device.index == 3  # torch.cuda's own refuses a device without an index
        module.limits.append(fraction)

    module.set_per_process_memory_fraction = limit
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return module


# -- the search


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 8, 9, 64, 100, 375])
def test_the_largest_that_fits_is_found_in_few_trials(bound):
    for most in range(bound + 1):
        tried = []

        def fits(n, most=most, tried=tried):
            tried.append(n)
            return n <= most

        assert largest(fits, bound) == most
        assert len(tried) == len(set(tried)) <= 2 * math.log2(bound) + 2
        assert 1 <= min(tried) and max(tried) <= min(bound, max(1, 2 * most))


# -- the trial


def state_of(trial):
    """Everything that a trial could change."""
    model = trial.model
    return dict(
        weights={name: tensor.clone() for name, tensor in model.state_dict().items()},
        gradients=[p.grad for p in model.parameters()],
        optimizer=copy.deepcopy(trial.optimizer.state_dict()),
    )


def assert_untouched(trial, before):
    torch.testing.assert_close(state_of(trial), before, rtol=0, atol=0)
    assert all(p.grad is None for p in trial.model.parameters())


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("stage, limit", [("nowhere", 9), ("forward", 1), ("backward", 1)])
def test_a_trial_leaves_nothing_behind(trial, ends_beyond, stepped, stage, limit):
    if stepped:
        trial.model(make_batch(trial.model.config, [LONGEST])).loss.backward()
        trial.optimizer.step()
        trial.optimizer.zero_grad()
    assert bool(trial.optimizer.state) == stepped
    tried, before = ends_beyond(limit, stage), state_of(trial)
    assert trial.fits(3) == (stage == "nowhere") and tried == [3]
    assert_untouched(trial, before)


def costs(batch):
    """What memory grows with: slots, attention weights, masked frames, and a share of the pairs of masked frames: where
    an utterance has three quarters of its group's masked frames, more than half of their pairs are its own.
    """
    pairs = sum(most * most * (rows.stop - rows.start) for rows, most in batch.groups)
    return np.array([len(batch.rows.row), sum(t * t for t in batch.rows.lengths), len(batch.masked), pairs * 0.75**2])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("prob", [0.3, 0.65, 0.9])
def test_no_micro_batch_costs_more_than_the_one_tried(seed, prob):
    random = np.random.default_rng(seed)
    shape = framing(mask_time_prob=prob, layerdrop=0.2)
    lengths = (SAMPLING_RATE * random.uniform(1, random.uniform(2, 16), 60)).astype(int)
    batches = EffectiveBatches(
        lengths, batch_samples=int(lengths.sum()) // 2, crop_samples=12 * SAMPLING_RATE, grid_samples=GRID, seed=seed
    )
    n, num_ranks = int(random.integers(1, 9)), int(random.integers(1, 4))
    worst = costs(worst_case(n, batches.longest, shape, seed))
    crops, following = batches.draw(Cursor())
    cut = dict(num_ranks=num_ranks, micro_batch_samples=n * batches.longest)
    for rank in range(num_ranks):
        for plan in plan_update(crops, 0, following, rank=rank, **cut):
            silence = [np.zeros(length, np.int16) for length in plan.crops.num_samples]
            assert (costs(build_batch(plan, plan.crops, silence, shape, seed)) <= worst).all()


# -- an accelerator


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("limit", [0, 1, 5, 12])
def test_an_accelerators_limit_is_found_by_running_into_it(trial, ends_beyond, device_module, stage, limit):
    tried, before = ends_beyond(limit, stage), state_of(trial)
    crops, memory = trial.search(12)
    assert crops == limit and max(tried) <= min(12, max(1, 2 * limit)) and memory == pytest.approx(0.92 * 9e9)
    assert device_module.limits == [pytest.approx(0.92 * 0.9), 1.0]
    assert_untouched(trial, before)


# -- the number of seconds


@pytest.fixture
def ranks(trial, monkeypatch):
    """This rank's search gives the first, the other ranks' messages are the others: (crops, bytes)."""
    trial.accelerator = SimpleNamespace(device=torch.device("cuda", 0))

    def build(mine, *others):
        monkeypatch.setattr(Trial, "search", lambda _, bound: min(mine, (bound, mine[1])))
        monkeypatch.setattr(micro_batch, "gather_object", lambda found: [*found, *others])

    return build


@pytest.mark.parametrize("mine, others", [(7, (5, 9)), (5, (7, 9)), (5, (5,))])
def test_all_ranks_take_the_least(trial, ranks, mine, others):
    ranks((mine, 8e9), *((n, 8e9) for n in others))
    seconds, finding = fit(trial, 20)
    assert round(seconds * SAMPLING_RATE) == 5 * LONGEST and "more would take above 8.0 GB" in finding


def test_a_device_is_not_filled_beyond_what_it_gains_from(trial, ranks, monkeypatch):
    ranks((1000, 8e9))
    seconds, finding = fit(trial, 12)
    assert round(seconds * SAMPLING_RATE) == 12 * LONGEST and "share of an effective batch" in finding
    seconds, finding = fit(trial, 1000)
    assert 800 - LONGEST / SAMPLING_RATE < seconds <= 800 and "800 s are enough" in finding


def test_a_device_that_holds_no_crop_is_a_users_matter(trial, ranks):
    ranks((4, 8e9), (0, 2e9))
    with pytest.raises(UserError, match=r"2\.0 GB.*--crop_seconds.*--gradient_checkpointing.*memory"):
        fit(trial, 20)


@pytest.mark.parametrize("longest, share, crops", [(20, 1, 1), (20, 2, 2), (20, 9, 3), (25, 9, 2), (61, 9, 1)])
def test_a_cpu_takes_a_minute_and_tries_nothing(trial, monkeypatch, longest, share, crops):
    monkeypatch.setattr(Trial, "search", None)
    trial.longest = longest * SAMPLING_RATE
    seconds, finding = fit(trial, share)
    assert seconds == crops * longest and finding.startswith(f"{seconds:.1f} s, not tried on a CPU; ")
    assert ("share of an effective batch" if share == crops else "60 s are enough") in finding

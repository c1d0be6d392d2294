"""`--micro_batch_seconds auto`: what is tried is the worst case, nothing is left of it, and what is found fits on every rank."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import make_batch, tiny_config
from transformers import Wav2Vec2FeatureExtractor
from two_ranks import NOISY, settings

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches, plan_update
from w2v2.data.collate import build_batch
from w2v2.errors import UserError
from w2v2.model.cpu import keep_freed
from w2v2.model.loading import build_framing
from w2v2.model.pretraining import PretrainingModel
from w2v2.train import memory, micro_batch
from w2v2.train.micro_batch import Finding, Trial, fit, largest, search_accelerator, search_cpu, share, worst_case
from w2v2.train.update import build_optimizer

LONGEST, GRID = 320 + 3 * 5120, 5120
OPTIMIZER = SimpleNamespace(
    learning_rate=0.1, adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-6, weight_decay=0.1, decay_norms_and_biases=True
)
MB = 10**6


def framing(**changes):
    return build_framing(tiny_config(**changes), Wav2Vec2FeatureExtractor(do_normalize=False))


@pytest.fixture
def trial():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    accelerator = Accelerator(cpu=True)
    config = tiny_config(**NOISY)
    model = PretrainingModel(config).train()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, OPTIMIZER))
    return Trial(accelerator, model, optimizer, framing(**NOISY), settings(), LONGEST, GRID)


@pytest.fixture
def ends_beyond(trial, monkeypatch):
    """Memory ends in the forward or in the backward pass of more than so many rows; the list of the rows that were tried."""

    def limit(rows, stage):
        whole, tried = PretrainingModel._context, []

        def context(model, normed, batch):
            hidden = whole(model, normed, batch)
            tried.append(len(hidden))
            if len(hidden) > rows and stage == "forward":
                raise torch.OutOfMemoryError("forward")
            if len(hidden) > rows:
                hidden.register_hook(_out_of_memory)
            return hidden

        monkeypatch.setattr(PretrainingModel, "_context", context)
        return tried

    return limit


def _out_of_memory(gradient):
    raise torch.OutOfMemoryError("backward")


# -- the search


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 8, 9, 64, 100, 375])
def test_the_largest_that_fits_is_found_in_few_trials_and_none_is_far_too_large(bound):
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
        generator=torch.get_rng_state(),
        modes=[module.training for module in model.modules()],
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
    trial.model.quantizer.eval()
    torch.rand(3)
    tried, before = ends_beyond(limit, stage), state_of(trial)
    assert trial.fits(3) == (stage == "nowhere") and tried == [3]
    assert_untouched(trial, before)


def test_a_bug_in_a_trial_is_no_lack_of_memory(trial, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    before = state_of(trial)
    monkeypatch.setattr(PretrainingModel, "_context", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        trial.fits(2)
    assert_untouched(trial, before)


def test_a_trial_runs_every_row_of_every_layer_in_train_mode_beside_all_that_an_update_holds(trial, monkeypatch):
    seen, whole = [], PretrainingModel._layer

    def layer(model, module, hidden, batch, index, dtype):
        held = [p.grad is not None for p in model.parameters()]
        seen.append(
            (index, model.training, len(batch.kept_rows[index]) == len(batch.lengths), batch.uniform, all(held))
        )
        return whole(model, module, hidden, batch, index, dtype)

    monkeypatch.setattr(PretrainingModel, "_layer", layer)
    trial.model.eval()
    trial.run(4)
    assert seen == [(0, True, True, False, True), (1, True, True, False, True)]
    assert not trial.model.training


def test_moments_are_stood_in_for_where_there_are_none_yet(trial):
    def stand_ins():
        found = trial._stand_ins(trial.model)
        trial.model.zero_grad()
        return sum(x.numel() for x in found)

    assert stand_ins() == 2 * trial.model.num_parameters()
    trial.model(make_batch(trial.model.config, [LONGEST])).loss.backward()
    trial.optimizer.step()
    assert stand_ins() == 0


def costs(batch):
    """What memory grows with: padded samples, latent frames, attention weights, pairs of masked slots."""
    B, S = batch.waveforms.shape
    T, M = batch.mask.shape[1], batch.positions.shape[1]
    return np.array([B * S, B * T, sum(t * t for t in batch.lengths), B * M * M])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("prob", [0.3, 0.65, 0.9])
def test_no_micro_batch_within_the_budget_costs_more_than_the_one_tried(seed, prob):
    random = np.random.default_rng(seed)
    shape = framing(mask_time_prob=prob, layerdrop=0.2)
    lengths = (SAMPLING_RATE * random.uniform(1, random.uniform(2, 16), 60)).astype(int)
    batches = EffectiveBatches(
        lengths, batch_samples=int(lengths.sum()) // 2, crop_samples=12 * SAMPLING_RATE, grid_samples=GRID, seed=seed
    )
    n, num_ranks = int(random.integers(1, 9)), int(random.integers(1, 4))
    # The tried one's shorter last row is there for what mixed lengths cost, and takes a little off the attention weights.
    worst = costs(worst_case(n, batches.longest, 0, shape, seed))
    crops, following = batches.draw(Cursor())
    cut = dict(num_ranks=num_ranks, micro_batch_samples=n * batches.longest)
    for rank in range(num_ranks):
        for plan in plan_update(crops, 0, following, rank=rank, **cut):
            silence = [np.zeros(length, np.int16) for length in plan.crops.num_samples]
            assert (costs(build_batch(plan, plan.crops, silence, shape, seed)) <= worst).all()


def test_the_worst_case_has_two_lengths_where_it_can():
    shape = framing(layerdrop=0.5)
    lengths = [worst_case(3, longest, grid, shape, 0).num_samples.tolist() for longest, grid in
               [(LONGEST, GRID), (LONGEST, 0), (shape.min_samples + 100, GRID)]]  # fmt: skip
    assert lengths == [[LONGEST, LONGEST, LONGEST - GRID], [LONGEST, LONGEST, LONGEST - 320]] + [
        [shape.min_samples + 100] * 3
    ]
    assert worst_case(1, LONGEST, GRID, shape, 0).num_samples.tolist() == [LONGEST]


def test_a_share_holds_its_part_of_the_batch_and_no_crop_more():
    for batch_crops, num_ranks, expected in [(10, 1, 10), (10, 4, 3), (10, 64, 1)]:
        batches = EffectiveBatches(
            np.full(20, LONGEST),
            batch_samples=batch_crops * LONGEST,
            crop_samples=LONGEST,
            grid_samples=GRID,
            seed=0,
        )
        assert share(batches, LONGEST, num_ranks) == expected


# -- an accelerator


@pytest.fixture
def device_module(monkeypatch):
    """Stands in for `torch.cuda`: 8 of 10 GB free and 1 GB ours; notes the limits that are set."""
    module = SimpleNamespace(limits=[], mem_get_info=lambda _: (8e9, 10e9), memory_reserved=lambda _: 1e9)
    module.current_device = lambda: 3

    def limit(fraction, device):
        assert device.index == 3  # torch.cuda's own refuses a device without an index
        module.limits.append(fraction)

    module.set_per_process_memory_fraction = limit
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return module


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("limit", [0, 1, 5, 12])
def test_an_accelerators_limit_is_found_by_running_into_it(trial, ends_beyond, device_module, stage, limit):
    tried, before = ends_beyond(limit, stage), state_of(trial)
    found = search_accelerator(trial, 12)
    assert found.crops == limit and max(tried) <= min(12, max(1, 2 * limit))
    assert ("share of an effective batch" if limit == 12 else f"{limit + 1} would take more than 8.3 GB") in found.why
    assert device_module.limits == [pytest.approx(0.92 * 0.9), 1.0]
    assert_untouched(trial, before)


def test_an_accelerator_is_not_filled_beyond_what_keeps_it_busy(trial, ends_beyond, device_module, monkeypatch):
    monkeypatch.setattr(micro_batch, "ACCELERATOR_SECONDS", 3.5 * LONGEST / SAMPLING_RATE)
    tried = ends_beyond(12, "forward")
    found = search_accelerator(trial, 12)
    assert found.crops == max(tried) == 3 and "enough for a GPU" in found.why


def test_the_limit_is_lifted_after_a_bug_too(trial, device_module, monkeypatch):
    monkeypatch.setattr(Trial, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search_accelerator(trial, 4)
    assert device_module.limits[-1] == 1.0


# -- a CPU


@pytest.fixture
def main_memory(trial, monkeypatch):
    """A process of 300 MB whose trial of n crops takes `base + n · crop` more, with `free` bytes left; the list of what was tried."""

    def build(base, crop, free):
        tried = []
        monkeypatch.setattr(Trial, "run", lambda _, n: tried.append(n))
        monkeypatch.setattr(memory, "resident", lambda: 300 * MB)
        monkeypatch.setattr(memory, "available", lambda: free)
        monkeypatch.setattr(memory, "peak_of", lambda work: work() or 300 * MB + base + tried[-1] * crop)
        return tried

    return build


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("free", [10, 99, 100, 174, 176, 400, 650, 980, 5000])
def test_a_cpu_takes_what_its_share_of_the_free_memory_holds_and_is_never_filled_to_find_out(
    trial, main_memory, monkeypatch, processes, free
):
    base, crop, bound = 10 * MB, 30 * MB, 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    tried = main_memory(base, crop, free * MB)
    room = free * MB / processes
    found = search_cpu(trial, bound)
    fitting_ones = [n for n in range(1, bound + 1) if base + n * crop <= 0.4 * room]
    assert found.crops == max(fitting_ones, default=0)
    assert tried == ([1, 2] if found.crops else [1])
    assert len(tried) == 1 or base + 2 * crop <= room
    assert ("share of an effective batch" in found.why) == (found.crops == bound)


def test_a_cpu_is_given_no_more_than_it_gains_from(trial, main_memory):
    main_memory(MB, MB, 10**12)
    most = int(60 * SAMPLING_RATE / LONGEST)
    found = search_cpu(trial, 1000)
    assert found.crops == most and "enough for a CPU" in found.why and f"about {(most + 1) / 1000:.1f} GB" in found.why
    trial.longest = 61 * SAMPLING_RATE
    assert search_cpu(trial, 1000).crops == 1


def test_where_memory_cannot_be_measured_a_minute_is_taken_and_said(trial, monkeypatch):
    most = int(60 * SAMPLING_RATE / LONGEST)
    monkeypatch.setattr(memory, "available", lambda: None)
    found = search_cpu(trial, 1000)
    assert found.crops == most and "cannot be measured" in found.why
    monkeypatch.undo()
    monkeypatch.setattr(memory, "peak_of", lambda work: None)
    assert search_cpu(trial, 1000) == found


def test_a_real_search_on_this_machine_leaves_nothing_behind(trial):
    before = state_of(trial)
    seconds, finding = fit(trial, 5)
    assert round(seconds * SAMPLING_RATE) == 5 * LONGEST
    assert finding.startswith(f"5 crops of {LONGEST / SAMPLING_RATE:.2f} s fit ({seconds:.1f} s); about ")
    assert_untouched(trial, before)


# -- several ranks


@pytest.fixture
def ranks(monkeypatch):
    """This rank's search gives (or raises) the first, the other ranks' messages are the others."""

    def build(mine, *others):
        def search(*_):
            if isinstance(mine, Exception):
                raise mine
            return mine

        sent = []
        monkeypatch.setattr(micro_batch, "search_cpu", search)
        monkeypatch.setattr(micro_batch, "gather_object", lambda found: sent.extend(found) or [*found, *others])
        return sent

    return build


@pytest.mark.parametrize("mine, others", [(7, (5, 9)), (5, (7, 9)), (5, (5,))])
def test_all_ranks_take_the_least(trial, ranks, mine, others):
    ranks(Finding(mine, f"{mine + 1} no"), *(Finding(n, f"{n + 1} no") for n in others))
    seconds, finding = fit(trial, 20)
    assert round(seconds * SAMPLING_RATE) == 5 * LONGEST and finding.endswith("; 6 no")


def test_a_rank_that_fails_tells_the_others_before_it_ends(trial, ranks):
    sent = ranks(ZeroDivisionError("a bug"), Finding(3, ""))
    with pytest.raises(ZeroDivisionError):
        fit(trial, 20)
    assert [f.crops for f in sent] == [-1]
    ranks(Finding(3, ""), *sent)
    with pytest.raises(RuntimeError, match="another rank: ZeroDivisionError: a bug"):
        fit(trial, 20)


def test_a_device_that_holds_no_crop_is_a_users_matter(trial, ranks):
    ranks(Finding(4, ""), Finding(0, "1 would take more than 2.0 GB"))
    with pytest.raises(UserError, match=r"2\.0 GB.*--crop_seconds.*--gradient_checkpointing.*memory"):
        fit(trial, 20)


# -- main memory


def test_a_peak_is_seen_though_memory_was_freed_before():
    keep_freed()
    size = 100 * MB
    np.ones(4 * size, np.uint8)
    before = memory.resident()
    peak = memory.peak_of(lambda: np.ones(size, np.uint8).sum())
    assert 0.9 * size < peak - before < 1.5 * size
    assert memory.peak_of(lambda: None) - before < 0.5 * size


def test_without_a_record_that_can_be_set_back_only_a_new_one_counts(monkeypatch):
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    highest = iter([5, 7, 7, 7])
    monkeypatch.setattr(memory, "_highest", lambda: next(highest))
    assert memory.peak_of(lambda: None) == 7
    assert memory.peak_of(lambda: None) is None


def test_the_tightest_of_the_system_and_the_control_groups_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    assert memory.available() is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    4000 kB\n")
    assert memory.available() == 4_096_000
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/x\n0::/outer/inner\n")
    for name, limit in [("outer", "3000000"), ("outer/inner", "max")]:
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("1500000\n")
        (folder / "memory.stat").write_text("anon 7\ninactive_file 500000\nactive_file 3\n")
    assert memory.available() == 2_000_000
    (tmp_path / "cgroup/outer/memory.max").write_text("500000\n")
    assert memory.available() == 0

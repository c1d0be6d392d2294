"""One update: its gradient is that of the effective batch, however it is cut and dealt; it is divided and clipped once."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import make_batch, tiny_config
from ranks import run_ranks
from two_ranks import DEALS, FIVE, LENGTHS, NOISY, build_model, gradient, pieces, settings

from w2v2.model import objective
from w2v2.train.update import seed_noise, take_step, train_update, validate

CUTS = {1: [7], 3: [2, 4, 1], 7: [1] * 7}
PADDING = ("padded_fraction", "eval_padded_fraction")  # the one figure that tells of the cut


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def noise_by_utterance(monkeypatch):
    """Gumbel noise that depends on the utterance alone: the part of the randomness that a piece's number seeds in
    training.
    """
    heard = {}

    def noise(logits):
        out = torch.zeros_like(logits)
        batch = heard["batch"]
        for key, own in zip(batch.keys, out.split(batch.masked_rows.lengths), strict=True):
            generator = torch.Generator().manual_seed(int(key) & 0xFFFF_FFFF)
            own.copy_(-(-torch.rand(own.shape, generator=generator, dtype=torch.float64).log()).log())
        return out

    monkeypatch.setattr(objective, "gumbel_noise", noise)
    return lambda model: model.register_forward_pre_hook(lambda _, args: heard.update(batch=args[0]))


def assert_same_gradient(found, expected, tolerance):
    assert found.keys() == expected.keys()
    whole = math.sqrt(sum(float(g.double().pow(2).sum()) for g in expected.values()))
    assert whole > 1e-3
    for name, wanted in expected.items():
        error = float((found[name].double() - wanted.double()).norm())
        assert error <= tolerance * (float(wanted.double().norm()) + 1e-2 * whole), name


def assert_same_metrics(found, expected, tolerance, but=()):
    assert found.keys() == expected.keys()
    for name in set(expected) - set(but):
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=1e-12), name


@pytest.mark.parametrize("diversity", ["effective_batch", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
def test_gradient_and_totals_do_not_depend_on_the_cut(accelerator, noise_by_utterance, diversity, dtype, tolerance):
    shared = diversity == "effective_batch"
    update = settings(shared_diversity=shared, diversity_weight=0.1 if shared else 0.0)
    found = {}
    for num_pieces, sizes in CUTS.items():
        model = build_model(dtype, layerdrop=0.4)
        noise_by_utterance(model)
        found[num_pieces] = gradient(accelerator, model, pieces(model.config, sizes, dtype), update)
    expected, totals = found[1]
    but = PADDING if shared else (*PADDING, "diversity_loss")
    for num_pieces in (3, 7):
        assert_same_gradient(found[num_pieces][0], expected, tolerance)
        assert_same_metrics(found[num_pieces][1].metrics(), totals.metrics(), 100 * tolerance, but)


def test_shared_diversity_is_that_of_the_loss_on_the_whole(accelerator, noise_by_utterance):
    model = build_model(layerdrop=0.4)
    noise_by_utterance(model)
    whole = pieces(model.config, [7])
    plain, totals = gradient(accelerator, model, whole, settings(shared_diversity=False))
    shared, shared_totals = gradient(accelerator, model, whole, settings(shared_diversity=True))
    assert_same_gradient(shared, plain, 1e-11)
    assert float(shared_totals.sums.loss) == pytest.approx(float(totals.sums.loss), rel=1e-12)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two gloo processes found, in one launch for all the cases."""
    out = tmp_path_factory.mktemp("two_ranks") / "found.pt"
    run_ranks(out.parent, (Path(__file__).parents[1] / "two_ranks.py"), out)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("shared", [True, False], ids=["effective_batch", "micro_batch"])
@pytest.mark.parametrize("deal", DEALS)
def test_two_processes_have_the_gradient_of_one(accelerator, two_ranks, deal, shared):
    """With dropout, Gumbel noise and layerdrop on: at the same cut all of it is the same wherever a piece runs."""
    model = build_model(**NOISY)
    whole = pieces(model.config, FIVE)
    assert len({len(batch.masked) for batch in whole}) == len(whole)
    expected, totals = gradient(accelerator, model, whole, settings(shared_diversity=shared))
    found = dict(two_ranks[deal, shared])
    metrics = found.pop("metrics")
    assert_same_gradient(found, expected, 1e-11)
    assert_same_metrics(metrics, totals.metrics(), 1e-11)


def test_noise_depends_on_seed_update_and_piece_alone(accelerator):
    def drawn(*arguments):
        torch.rand(int(torch.randint(1, 100, ())))  # whatever was drawn before
        seed_noise(*arguments, torch.device("cpu"))
        return torch.rand(4).tolist()

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({tuple(drawn(*arguments)) for arguments in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4


def closed_form(accelerator, gradient, factor, learning_rate, max_grad_norm, *is_finite):
    """Run `take_step` of plain gradient descent on one weight vector of zeros: (weights after it, the norm returned)."""
    weight = torch.nn.Parameter(torch.zeros(len(gradient), dtype=torch.float64))
    optimizer = accelerator.prepare(torch.optim.SGD([weight], lr=123.0, momentum=0.9))
    for part in gradient, gradient:  # two backward passes accumulate
        (weight * torch.tensor(part, dtype=torch.float64) / 2).sum().backward()
    update = settings(learning_rate=learning_rate, max_grad_norm=max_grad_norm)
    norm = take_step(accelerator, optimizer, factor, update, *is_finite)
    assert weight.grad is None or not weight.grad.any()
    return weight.detach(), norm, optimizer


@pytest.mark.parametrize(("max_norm", "clip"), [(0.0, 1.0), (5.0, 0.25), (100.0, 1.0)])
def test_step_divides_once_and_clips_to_the_norm(accelerator, max_norm, clip):
    weight, norm, _ = closed_form(accelerator, [30.0, 40.0], 0.4, 0.5, max_norm)  # 0.4 · (30, 40) = (12, 16), norm 20
    assert norm == pytest.approx(20.0)
    assert weight.tolist() == pytest.approx([-0.5 * clip * 12.0, -0.5 * clip * 16.0], rel=1e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_takes_no_step(accelerator, value, max_norm):
    weight, norm, optimizer = closed_form(accelerator, [1.0, value], 0.4, 0.5, max_norm)
    assert not math.isfinite(norm)
    assert weight.tolist() == [0.0, 0.0]
    assert not optimizer.state  # nor did the moments see it


def test_update_divides_by_the_masked_frames_of_all_pieces(accelerator):
    """Gradient descent of rate 1 leaves the negative gradient of the mean: that of the sum over the count."""
    model = build_model()
    config, before = model.config, {name: p.detach().clone() for name, p in model.named_parameters()}
    batches, update = pieces(config, FIVE), settings(learning_rate=1.0, diversity_weight=0.0, shared_diversity=False)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    metrics, totals = train_update(accelerator, model, optimizer, batches, update)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}

    model.load_state_dict(before, strict=False)
    total = 0.0
    for batch in batches:
        seed_noise(update.seed, update.step, batch.plan.piece, torch.device("cpu"))
        total = total + model(batch, update.gumbel_temperature, 0.0).loss
    masked = sum(len(batch.masked) for batch in batches)
    (total / masked).backward()
    expected = {name: -p.grad for name, p in model.named_parameters()}
    assert_same_gradient({name: after[name] - before[name] for name in before}, expected, 1e-10)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in expected.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-10)
    assert metrics["masked_frames"] == masked == int(totals.sums.num_masked)
    assert metrics["loss"] == pytest.approx(total.item() / masked, rel=1e-12)
    assert metrics["batch_hours"] == pytest.approx(sum(LENGTHS) / 16_000 / 3600)


def test_validation_is_the_same_each_time_and_for_every_cut(accelerator):
    model = build_model(**NOISY)
    whole = pieces(model.config, [7])
    first, _ = validate(accelerator, model, whole, 0.1)
    torch.manual_seed(99)
    assert validate(accelerator, model, whole, 0.1)[0] == first
    assert model.training
    perplexity = first["eval_codebook_perplexity"] / (model.quantizer.num_groups * model.quantizer.num_vars)
    assert first["eval_diversity_loss"] == pytest.approx(1.0 - perplexity, rel=1e-9)
    terms = first["eval_contrastive_loss"] + 0.1 * first["eval_diversity_loss"] + 10.0 * first["eval_feature_penalty"]
    assert first["eval_loss"] == pytest.approx(terms, rel=1e-9)
    for sizes in (CUTS[3], CUTS[7]):
        assert_same_metrics(validate(accelerator, model, pieces(model.config, sizes), 0.1)[0], first, 1e-9)


def test_an_update_without_a_readable_utterance_takes_no_step(accelerator):
    model = build_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1))
    nothing = [make_batch(tiny_config(), [9_000], weight=0.0, dtype=torch.float64)]
    _, totals = train_update(accelerator, model, optimizer, nothing, settings(shared_diversity=False))
    found = totals.metrics()
    assert found["masked_frames"] == 0 and all(math.isfinite(value) for value in found.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

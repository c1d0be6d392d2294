"""The loss terms against brute force, closed forms and the stock functions."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same_function
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

from w2v2.model.objective import (
    choose_codes,
    code_statistics,
    contrastive_loss,
    diversity_loss,
    feature_penalty,
    perplexity,
    shared_diversity_loss,
)

G, V = 2, 3  # a codebook of nine combinations: collisions everywhere


def random_problem(seed, B=3, M=7, D=6, K=8, num_entries=V):
    """A micro-batch whose distractors collide with the positive now and then."""
    torch.manual_seed(seed)
    codes = torch.randint(num_entries, (B, M, G))
    codebook = torch.randn(G, num_entries, D // G, dtype=torch.float64)
    quantized = torch.cat([codebook[g][codes[..., g]] for g in range(G)], -1)
    counts = torch.randint(2, M + 1, (B,))
    counts[0] = M
    valid = torch.arange(M) < counts[:, None]
    draws = (torch.rand(B, M, K) * counts[:, None, None]).long()
    context = torch.randn(B, M, D, dtype=torch.float64)
    return context.requires_grad_(), quantized.requires_grad_(), codes, draws, valid


def brute_force(context, quantized, codes, draws, valid, temperature):
    """Frame by frame: gather the candidates, drop the collisions, cross-entropy with the positive in front."""
    loss, correct, left = 0.0, 0, 0
    for b, m in valid.nonzero().tolist():
        candidates = [m] + [k for k in draws[b, m].tolist() if codes[b, k].tolist() != codes[b, m].tolist()]
        logits = F.cosine_similarity(context[b, m], quantized[b, candidates], dim=-1) / temperature
        loss = loss + F.cross_entropy(logits[None], torch.tensor([0]), reduction="sum")
        left += len(candidates) - 1
        correct += len(candidates) > 1 and bool((logits[0] > logits[1:]).all())
    pairs = [Counter(map(tuple, row[used].tolist())) for row, used in zip(codes, valid, strict=True)]
    return loss, correct, sum(max(counted.values()) for counted in pairs), left


@pytest.mark.parametrize("num_entries", [1, 2, 3, 50])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrastive_loss_and_gradient_equal_brute_force(num_entries, temperature):
    for seed in range(5):
        problem = random_problem(seed, num_entries=num_entries)
        expected, *counted = brute_force(*problem, temperature)
        loss, *counts = contrastive_loss(*problem, temperature)
        assert counts == counted
        assert_same_function(loss, expected, problem[:2], rtol=1e-10, atol=1e-10)


def test_unused_slots_count_for_nothing():
    *tensors, codes, draws, valid = random_problem(4)
    ours = contrastive_loss(*tensors, codes, draws, valid, 0.1)
    for tensor, gradient in zip(tensors, torch.autograd.grad(ours[0], tensors), strict=True):
        assert (gradient[~valid] == 0).all() and gradient[valid].abs().max() > 0
        tensor.data[~valid] = 1e3 * torch.randn_like(tensor[~valid])
    assert ours == contrastive_loss(*tensors, codes, draws, valid, 0.1)


def test_opposite_vectors_at_a_low_temperature_stay_finite():
    context = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)
    codes, draws = torch.tensor([[[0], [1]]]), torch.tensor([[[1], [0]]])
    loss, *_ = contrastive_loss(context, -context.detach(), codes, draws, torch.ones(1, 2, dtype=torch.bool), 0.025)
    assert loss.item() == pytest.approx(2 * 80)  # each positive at −1/τ, its distractor at 1/τ
    assert torch.autograd.grad(loss, context)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_choice_and_gradient_are_the_stock_gumbel_softmax(temperature):
    logits = torch.randn(10, G, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    weights, codes = choose_codes(logits, temperature)
    torch.manual_seed(1)
    expected = F.gumbel_softmax(logits, tau=temperature, hard=True)
    assert torch.equal(weights, expected) and torch.equal(codes, expected.argmax(-1))
    assert_same_function(weights, expected, [logits], rtol=1e-12, atol=1e-15)


def random_logits(seed, P=36, entries=11):
    torch.manual_seed(seed)
    valid = torch.rand(P) < 0.6
    return (2 * torch.randn(P, G, entries, dtype=torch.float64)).requires_grad_(), valid


def test_code_statistics_sum_over_the_masked_frames_alone():
    logits, valid = random_logits(0)
    soft, hard, entropy = code_statistics(logits, valid)
    p = logits.softmax(-1)[valid]  # (masked, G, V)
    torch.testing.assert_close(soft, p.sum(0))
    assert torch.equal(hard, F.one_hot(p.argmax(-1), 11).sum(0).double())
    torch.testing.assert_close(entropy, torch.distributions.Categorical(probs=p).entropy().mean(-1).sum())
    assert not entropy.requires_grad
    assert (torch.autograd.grad(soft.pow(2).sum(), logits)[0][~valid] == 0).all()


def test_perplexity_and_diversity_loss_are_the_stock_ones():
    logits, valid = random_logits(1)
    soft, num_masked, size = code_statistics(logits, valid)[0], valid.sum(), G * 11
    stock = Wav2Vec2GumbelVectorQuantizer._compute_perplexity(logits.softmax(-1), valid[None])
    torch.testing.assert_close(perplexity(soft / num_masked), stock)
    torch.testing.assert_close(diversity_loss(soft, num_masked), (size - stock) / size * num_masked)
    none = diversity_loss(code_statistics(logits, valid & False)[0], num_masked * 0)
    assert none.item() == 0.0 and (torch.autograd.grad(none, logits)[0] == 0).all()


def test_diversity_loss_is_zero_at_even_use_most_at_collapse():
    collapsed, frames = torch.eye(V)[:1].expand(G, V), torch.tensor(V)
    assert float(diversity_loss(torch.ones(G, V), frames)) == pytest.approx(0, abs=1e-5)
    assert float(diversity_loss(V * collapsed, frames)) == pytest.approx((1 - 1 / V) * V)


@pytest.mark.parametrize("seed", range(5))
def test_shared_diversity_losses_add_up_to_that_of_the_whole(seed):
    logits, valid = random_logits(seed)
    soft, num_masked = code_statistics(logits, valid)[0], valid.sum()
    loss, mean = diversity_loss(soft, num_masked), soft / num_masked
    for cut in ([36], [6, 30], [12, 6, 18], [6] * 6):
        pieces = zip(logits.split(cut), valid.split(cut), strict=True)
        total = sum(shared_diversity_loss(code_statistics(piece, used)[0], mean, used.sum()) for piece, used in pieces)
        assert_same_function(total, loss, [logits], rtol=1e-12, atol=1e-15)


def test_the_diversity_gradient_survives_unused_entries():
    """In single precision a sharp softmax underflows to a mean of zero, where the slope of −x log x is infinite."""
    logits = torch.full((4, 1, 5), -500.0)
    logits[..., 0] = 500.0
    logits.requires_grad_()
    soft, frames = code_statistics(logits, torch.ones(4, dtype=torch.bool))[0], torch.tensor(4)
    for loss in (diversity_loss(soft, frames), shared_diversity_loss(soft, soft.detach() / 4, frames)):
        assert loss.isfinite() and torch.autograd.grad(loss, logits, retain_graph=True)[0].isfinite().all()


def test_feature_penalty_is_the_weighted_mean_square():
    features, weight = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), torch.rand(8).double()
    expected = sum((frame**2).mean() * own for frame, own in zip(features, weight, strict=True))
    assert_same_function(feature_penalty(features, weight), expected, [features])
    half = torch.full((4, 3), 300.0, dtype=torch.float16)  # 300² is beyond fp16
    assert float(feature_penalty(half, torch.full((4,), 0.5))) == 180_000.0

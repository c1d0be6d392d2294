"""The loss terms as sums over masked frames, with the counts that later divide them: pure tensors, no modules.

An effective batch is cut into micro-batches at will, and only sums add up to the same whole. The terms are equations 2
to 4 of the wav2vec 2.0 paper; the feature penalty is fairseq's.

Shapes: B utterances, N latent frames, P masked frames of all utterances, M of the one that has most, K distractors, G
codebook groups, V entries of a group, D width, d width of a codevector. `valid` says which places hold a masked frame.
"""

import torch
import torch.nn.functional as F


def scale_gradient(x: torch.Tensor, scale: float) -> torch.Tensor:
    """`x` itself, whose gradient is scaled on the way back (fairseq's `feature_grad_mult`)."""
    if scale == 1.0 or not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient * scale)
    return x


def gumbel_noise(logits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of the same shape and type, from the default generator."""
    return -torch.empty_like(logits).exponential_().log()


def choose_codes(logits_PGV: torch.Tensor, temperature: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot weights (P, G, V) and codes (P, G) int64.

    With a temperature (training) the Gumbel softmax chooses (equation 1), and the weights have the softmax's gradient.
    Without one (evaluation) the most likely entry is chosen, without gradient.
    """
    soft = logits_PGV if temperature is None else ((logits_PGV + gumbel_noise(logits_PGV)) / temperature).softmax(-1)
    codes = soft.argmax(-1)
    one_hot = F.one_hot(codes, soft.shape[-1]).to(soft.dtype)
    return one_hot if temperature is None else one_hot + (soft - soft.detach()), codes


def look_up(weights_PGV: torch.Tensor, codevectors: torch.Tensor) -> torch.Tensor:
    """Codevectors, of the module's (1, G · V, d), of the chosen entries, groups side by side: (P, G · d)."""
    by_group = codevectors.view(*weights_PGV.shape[-2:], -1)  # (G, V, d)
    return torch.einsum("pgv,gvd->pgd", weights_PGV, by_group).flatten(1)  # one small product a group


def code_statistics(logits_PGV: torch.Tensor, valid_P: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sums over the valid frames: softmax of the logits without noise (G, V), which carries the gradient; how often each
    entry is the most likely one (G, V); and the softmax's entropy () in nats, averaged over groups.
    """
    weight = valid_P.to(logits_PGV.dtype)
    log_p = logits_PGV.log_softmax(-1)
    p = log_p.exp()
    hard = torch.zeros(logits_PGV.shape[-2:], dtype=weight.dtype, device=weight.device)  # (G, V)
    entry = logits_PGV.argmax(-1).T  # (P, G) -> (G, P)
    hard.scatter_add_(1, entry, weight.expand_as(entry))
    entropy = -(p * log_p).detach().sum(-1).mean(-1)  # (P,)
    return torch.einsum("pgv,p->gv", p, weight), hard, (entropy * weight).sum()


def entropy(mean_GV: torch.Tensor) -> torch.Tensor:
    """Entropy (G,) of each group's mean code distribution, in nats: from 0 (one entry) to log V (every entry alike)."""
    # The slope of p log p is infinite at an entry that nobody uses, its gradient not a number. The floor prevents that.
    floored = mean_GV.clamp_min(torch.finfo(mean_GV.dtype).tiny)
    return -torch.xlogy(mean_GV, floored).sum(-1)


def perplexity(mean_GV: torch.Tensor) -> torch.Tensor:
    """Perplexity of the mean code distribution, summed over groups: from G (collapsed) to G · V (every entry alike)."""
    return torch.exp(entropy(mean_GV)).sum()


def diversity_loss(soft_GV: torch.Tensor, num_masked: torch.Tensor) -> torch.Tensor:
    """(G·V − perplexity) / (G·V), times the masked frames (equation 4 in the form of fairseq and `transformers`)."""
    size = soft_GV.numel()
    return (size - perplexity(soft_GV / num_masked.clamp_min(1))) / size * num_masked


def shared_diversity_loss(soft_GV: torch.Tensor, mean_GV: torch.Tensor, num_masked: torch.Tensor) -> torch.Tensor:
    """A micro-batch's share in the diversity loss of the effective batch, whose mean code distribution is `mean_GV`.

    Its value is the whole's loss times this micro-batch's masked frames. The loss is linearised at the known mean, so
    the shares' gradients add up to the gradient of `diversity_loss` on the whole.
    """
    with torch.enable_grad():
        mean = mean_GV.detach().requires_grad_(True)
        loss = (mean.numel() - perplexity(mean)) / mean.numel()
        slope = torch.autograd.grad(loss, mean)[0]  # (G, V)
    share = (slope * soft_GV).sum()
    return loss.detach() * num_masked + share - share.detach()


def contrastive_loss(
    context_BMD: torch.Tensor,
    quantized_BMD: torch.Tensor,
    codes_BMG: torch.Tensor,
    distractors_BMK: torch.Tensor,
    valid_BM: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, ...]:
    """Tell the true quantized frame from its distractors by cosine similarity over the temperature τ (equation 3).

    All candidates are masked frames of the same utterance: `distractors_BMK` says which of them each frame draws. So
    their similarities are one M × M product a row, and the K draws of a frame are counts on its columns. A distractor
    with the positive's own codes is left out, as in fairseq and `transformers`.

    Returns: sums over masked frames of the cross-entropy, of frames whose positive beats every distractor, of frames
    that always guessing the utterance's commonest codes would get right, and of distractors left.
    """
    # 1. Similarities S of every masked frame to every candidate.
    context, quantized = F.normalize(context_BMD, dim=-1, eps=1e-8), F.normalize(quantized_BMD, dim=-1, eps=1e-8)
    similarity = context @ quantized.transpose(1, 2) / temperature  # (B, M, M)

    # 2. How often each candidate was drawn, unless it has the positive's codes.
    draws = torch.zeros_like(similarity)
    draws.scatter_add_(2, distractors_BMK, torch.ones_like(distractors_BMK, dtype=draws.dtype))
    other_code = (codes_BMG[:, :, None] != codes_BMG[:, None]).any(-1)  # (B, M, M)
    draws = draws * other_code

    # 3. Accuracy: does the positive beat every distractor? And that of a context which ignores the audio, at best.
    positive = similarity.diagonal(dim1=1, dim2=2)  # (B, M)
    best_distractor = similarity.detach().masked_fill(draws == 0, -torch.inf).amax(-1)
    correct = (positive.detach() > best_distractor) & best_distractor.isfinite()
    commonest = (~other_code & valid_BM[:, None]).sum(-1).amax(-1)  # (B,) frames that have the commonest codes

    # 4. Log of the sum of exponentials, with the positive as a candidate. Relative to the peak it cannot overflow.
    candidates = draws + torch.eye(draws.shape[-1], dtype=draws.dtype, device=draws.device)
    peak = torch.maximum(best_distractor, positive.detach())  # (B, M) others than candidates may lie above it
    log_sum = ((similarity - peak[..., None]).clamp_max(0.0).exp() * candidates).sum(-1).log() + peak

    weight = valid_BM.to(similarity.dtype)
    loss = torch.where(valid_BM, log_sum - positive, 0.0).sum()
    correct, commonest = ((correct & valid_BM).sum().to(weight.dtype), commonest.sum().to(weight.dtype))
    return loss, correct, commonest, (draws.sum(-1) * weight).sum()


def feature_penalty(features_NC: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the mean squares of the convs' output frames."""
    square = features_NC.to(torch.promote_types(features_NC.dtype, torch.float32)).pow(2).mean(-1)  # (N,)
    return (square * weight_N).sum()

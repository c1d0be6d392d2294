"""It learns: a short run of pretrain.py, judged by the stock model with masks and distractors of its own.

The corpus is a language of twelve vowels, each followed by one of two others. A masked vowel follows from its
neighbours. Floors are well below what seeds reach. Faults that the optimizer evens out show in what the first and the
last update report.
"""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from conftest import run_here, tiny_config, write_csv
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

import pretrain
from w2v2.train.log import read_metrics

RATE, SECONDS, VOWELS = 16_000, 4.0, 12
FORMANTS = np.random.default_rng(3).uniform((200, 900), (900, 3500), (VOWELS, 2))  # Hz
TRAINED, HELD_OUT = range(100), range(1000, 1160)
SHAPE = dict(conv_dim=[32] * 7, hidden_size=64, intermediate_size=128, num_attention_heads=4)
CODES = dict(num_codevectors_per_group=16, codevector_dim=32, proj_codevector_dim=32, num_negatives=50)
FLAGS = dict(
    min_seconds=0.5, crop_seconds=SECONDS, batch_hours=8 / 3600, micro_batch_seconds=4.1, mask_time_length=5,
    max_steps=400, learning_rate=2e-3, warmup_steps=30, max_gumbel_temperature=0.5, diversity_loss_weight=0.1,
    diversity_delay_steps=200, diversity_warmup_steps=200, feature_penalty_weight=0.0, feature_grad_mult=1.0, logging_steps=50,
    eval_steps=400, save_steps=1000, dataloader_num_workers=0, report_to=["none"], use_cpu=True, collapse_action="none",
)  # fmt: skip


def speak(number: int) -> np.ndarray:
    """An utterance: vowels of 80 to 140 ms by a voice of its own pitch, in faint noise."""
    rng = np.random.default_rng([7, number])
    pitch, vowel, pieces = rng.uniform(90, 200), int(rng.integers(VOWELS)), []
    harmonics = pitch * np.arange(1, int(4000 / pitch))[:, None]
    while sum(map(len, pieces)) < SECONDS * RATE:
        gain = np.exp(-(((harmonics - FORMANTS[vowel]) / 150) ** 2)).sum(1)  # (harmonics,)
        t = np.arange(int(rng.uniform(0.08, 0.14) * RATE)) / RATE
        pieces.append(gain @ np.sin(2 * np.pi * harmonics * t) * np.hanning(len(t)) ** 0.5)
        vowel = (5 * vowel + 1 + 3 * int(rng.integers(2))) % VOWELS
    wave = np.concatenate(pieces)[: int(SECONDS * RATE)]
    return 0.1 * wave / wave.std() + 0.003 * rng.standard_normal(len(wave))


def write_corpus(folder: Path, numbers) -> list[str]:
    paths = [folder / f"{number}.wav" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        soundfile.write(path, speak(number), RATE)
    return [str(write_csv(folder / f"{numbers[0]}.csv", paths, [SECONDS] * len(paths)))]


def learn(folder: Path, seed: int) -> Path:
    """Pretrain for half a minute."""
    tiny_config(**SHAPE | CODES).save_pretrained(folder / "model")
    data = dict(train_data=write_corpus(folder, TRAINED), validation_data=write_corpus(folder, HELD_OUT))
    run = dict(config_name=str(folder / "model"), output_dir=str(folder / "run"), seed=seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(FLAGS | data | run))
    assert run_here(pretrain.main, folder / "config.yaml") == 0
    return folder / "run"


def hear(model: Wav2Vec2ForPreTraining, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An utterance for the stock model: samples (1, S), mask (1, T) and distractors (1, T, K) by the stock functions."""
    samples = torch.from_numpy(speak(number)).float()[None]
    shape = (1, int(model._get_feat_extract_output_lengths(samples.shape[1])))
    mask = _compute_mask_indices(shape, 0.65, FLAGS["mask_time_length"], min_masks=2)
    drawn = _sample_negative_indices(shape, model.config.num_negatives, mask)
    return samples, dict(mask_time_indices=torch.from_numpy(mask), sampled_negative_indices=torch.from_numpy(drawn))


def first_gradient(config_folder: Path) -> float:
    """Norm of the stock model's gradient for a masked frame, before the first update: the mean over batches of 8 s."""
    np.random.seed(0)  # of the stock functions
    norms = []
    for first in range(0, 20, 2):
        torch.manual_seed(first)
        model = Wav2Vec2ForPreTraining(Wav2Vec2Config.from_pretrained(config_folder)).train()
        model.set_gumbel_temperature(FLAGS["max_gumbel_temperature"])
        num_masked = 0
        for number in (first, first + 1):
            samples, drawn = hear(model, number)
            model(samples, **drawn).contrastive_loss.backward()
            num_masked += int(drawn["mask_time_indices"].sum())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)) / num_masked)
    return float(np.mean(norms))


def judge(folder: Path) -> tuple[float, float, float]:
    """The stock model on unheard voices: accuracy, that of a constant guess, and the perplexity of its codes.

    Shapes: S samples, T frames, M masked ones, K distractors, G codebook groups, V entries.
    """
    model = Wav2Vec2ForPreTraining.from_pretrained(folder).eval()
    quantizer, totals, chosen = model.quantizer, np.zeros(3), []
    np.random.seed(0)
    for number in HELD_OUT:
        samples, masked = hear(model, number)
        here, drawn = masked["mask_time_indices"][0], masked["sampled_negative_indices"][0]  # (T,), (T, K)
        with torch.no_grad():
            out = model(samples, **masked)
            features = model.wav2vec2.feature_extractor(samples).mT  # (1, T, C)
            logits = quantizer.weight_proj(model.wav2vec2.feature_projection.layer_norm(features))[0]
        codes = logits.unflatten(-1, (quantizer.num_groups, -1)).argmax(-1)  # (T, G)
        context, quantized = out.projected_states[0], out.projected_quantized_states[0]
        positive = F.cosine_similarity(context, quantized, dim=-1)[here]  # (M,)
        others = F.cosine_similarity(context[:, None], quantized[drawn], dim=-1)[here]  # (M, K)
        is_same = (codes[:, None] == codes[drawn]).all(-1)[here]
        found = positive > others.masked_fill(is_same, -torch.inf).amax(-1)
        codes = codes[here]  # (M, G)
        commonest = (codes[:, None] == codes).all(-1).sum(-1).amax()
        totals += [int(found.sum()), int(commonest), len(codes)]
        chosen.append(codes)
    shares = F.one_hot(torch.cat(chosen), quantizer.num_vars).double().mean(0)  # (G, V)
    perplexity = float(torch.exp(-torch.xlogy(shares, shares).sum(-1)).sum())
    return totals[0] / totals[2], totals[1] / totals[2], perplexity


def test_a_short_run_learns_and_says_so(tmp_path):
    run = learn(tmp_path, seed=2)
    first, *_, last, said = read_metrics(run / "metrics.jsonl")
    accuracy, guess, perplexity = judge(run)
    assert accuracy - guess > 0.15, "the context predicts no codes"
    assert perplexity > 6, "few codes are in use"
    assert said["eval_accuracy"] == pytest.approx(accuracy, abs=0.025), "masks, positives or distractors are others"
    assert first["grad_norm"] == pytest.approx(first_gradient(tmp_path / "model"), rel=0.35), "divided otherwise"
    size = 2 * CODES["num_codevectors_per_group"]
    assert last["diversity_loss"] == pytest.approx(1 - last["codebook_perplexity"] / size, abs=0.1)

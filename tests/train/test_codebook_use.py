"""Which codebook entries are used: the counts of a brute force over the stock model's codes, and lines that a resumed
run repeats.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import NO_DROPOUT, make_batch, run_here, tiny_config, write_recipe
from parity import as_rows, pair

import pretrain
from w2v2.train.log import read_metrics
from w2v2.train.records import CodebookUse
from w2v2.train.state import Totals

MICRO_BATCHES = ([9_999, 24_000, 5_440], [16_400], [30_000, 8_000])


def count_codes(stock, batch):
    """(G, V) by the stock modules, utterance by utterance and frame by frame."""
    G, V = stock.quantizer.num_groups, stock.quantizer.num_vars
    counts = np.zeros((G, V), int)
    for wave, mask, length in zip(*as_rows(batch), batch.num_samples, strict=True):
        features = stock.wav2vec2.feature_extractor(wave[None, :length]).transpose(1, 2)
        normed = stock.wav2vec2.feature_projection.layer_norm(features)
        logits = stock.quantizer.weight_proj(normed)[0].unflatten(-1, (G, V)).numpy()
        for frame in np.flatnonzero(mask.numpy()):
            for g in range(G):
                counts[g, max(range(V), key=logits[frame, g].__getitem__)] += 1
    return counts


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@torch.no_grad()
def test_counts_coverage_and_entropy_are_those_of_a_brute_force(large):
    config = tiny_config(large, num_codevectors_per_group=40)
    ours, stock = pair(config)
    totals, counts = Totals(), 0
    for number, lengths in enumerate(MICRO_BATCHES):
        batch = make_batch(config, lengths, first=10 * number)
        totals.add(ours(batch, 1.3), batch)
        counts = counts + count_codes(stock, batch)
    totals.add(ours(dummy := make_batch(config, [20_000], first=90, weight=0.0)), dummy)
    totals = totals.reduced(Accelerator(cpu=True))
    np.testing.assert_array_equal(totals.sums.codes_hard.numpy(), counts)
    metrics = totals.metrics("eval_")
    for g, of_group in enumerate(counts, start=1):
        share = of_group[of_group > 0] / of_group.sum()
        assert metrics[f"eval_codebook_coverage_{g}"] == len(share) / 40 < 1
        assert metrics[f"eval_codebook_entropy_{g}"] == pytest.approx(-(share * np.log(share)).sum())
    assert f"eval_codebook_coverage_{config.num_codevector_groups + 1}" not in metrics
    perplexity = sum(np.exp(metrics[f"eval_codebook_entropy_{g}"]) for g in (1, 2))
    assert metrics["eval_codebook_perplexity_hard"] == pytest.approx(perplexity)


@pytest.mark.parametrize("validates", [True, False], ids=["validation", "training"])
def test_lines_add_up_and_a_resumed_run_repeats_them(tmp_path, validates):
    values = dict(batch_hours=0.001, micro_batch_seconds=6.0, max_steps=6, save_steps=2, eval_steps=3, use_cpu=True)
    flags = write_recipe(tmp_path, NO_DROPOUT, **values, dataloader_num_workers=0, report_to=["none"])
    more = [] if validates else ["--validation_data="]

    def run(*others):
        assert run_here(pretrain.main, flags, "--output_dir", tmp_path / "run", *more, *others) == 0
        return (tmp_path / "run" / CodebookUse.file).read_bytes()

    written = run()
    lines, records = list(map(json.loads, written.splitlines())), read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == ([3, 6] if validates else [2, 4, 6])
    for line in lines:
        prefix, first = ("eval_", line["step"]) if validates else ("", line["step"] - 1)
        covered = [r for r in records if prefix + "loss" in r and first <= r["step"] <= line["step"]]
        assert line["audio_hours"] == covered[-1]["audio_hours"] and np.shape(line["counts"]) == (2, 12)
        assert set(map(sum, line["counts"])) == {sum(r[prefix + "masked_frames"] for r in covered)}
    if validates:
        for g in (1, 2):
            assert np.mean(np.array(lines[1]["counts"][g - 1]) > 0) == covered[-1][f"eval_codebook_coverage_{g}"]
    # Killed after the save of update 4, or between the two lines of the last validation.
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    assert run("--resume_from_checkpoint", "auto") == written
    kept = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(line for line in kept[:-1]))
    assert run("--resume_from_checkpoint", "auto") == written

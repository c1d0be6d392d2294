"""Every pretraining recipe holds the published values, but for the deviations that stand here by name.

Sources: the wav2vec 2.0 paper, section 4.2, and where it is silent fairseq's pretraining/wav2vec2_base_librispeech.yaml
and wav2vec2_large_librivox.yaml with the defaults of its code.
"""

from dataclasses import asdict
from pathlib import Path

import pytest

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line
from w2v2.model.loading import build_config, load_feature_extractor
from w2v2.train.schedule import num_warmup_steps

PRETRAIN = Path(__file__).resolve().parents[1] / "configs" / "pretrain"

BASE = dict(
    # The model.
    conv_dim=(512,) * 7, conv_kernel=(10, 3, 3, 3, 3, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2),
    feat_extract_norm="group", conv_bias=False, do_normalize=False, do_stable_layer_norm=False,
    num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=16,
    num_hidden_layers=12, hidden_size=768, intermediate_size=3072, num_attention_heads=8,
    num_codevector_groups=2, num_codevectors_per_group=320, codevector_dim=256, proj_codevector_dim=256,
    # What it is spared.
    hidden_dropout=0.1, attention_dropout=0.1, feat_proj_dropout=0.1, feat_quantizer_dropout=0.1,
    activation_dropout=0.0, layerdrop=0.05,
    # The objective: a 0.065th of the frames begin a span of ten.
    mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2, num_negatives=100,
    contrastive_logits_temperature=0.1, diversity_loss_weight=0.1, diversity_delay_steps=0, diversity_warmup_steps=0,
    max_gumbel_temperature=2.0, min_gumbel_temperature=0.5, gumbel_temperature_decay=0.999995,
    feature_penalty_weight=10.0, feature_grad_mult=0.1,
    # Audio and batches.
    min_seconds=2.0, crop_seconds=15.625, length_grid_seconds=0.0, batch_hours=1.6,
    # Optimization.
    learning_rate=5e-4, lr_scheduler_type="linear", max_steps=400_000, warmup=32_000, adam_beta1=0.9, adam_beta2=0.98,
    adam_epsilon=1e-6, weight_decay=0.01, max_grad_norm=0.0,
)  # fmt: skip
LARGE = BASE | dict(
    num_hidden_layers=24, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, codevector_dim=768,
    proj_codevector_dim=768, layerdrop=0.2, min_gumbel_temperature=0.1, crop_seconds=20.0, batch_hours=2.7,
    learning_rate=3e-4, max_steps=250_000, warmup=20_000,
)  # fmt: skip
LIBRIVOX = LARGE | dict(
    feat_extract_norm="layer", conv_bias=True, do_normalize=True, do_stable_layer_norm=True, hidden_dropout=0.0,
    attention_dropout=0.0, feat_proj_dropout=0.0, feat_quantizer_dropout=0.0, layerdrop=0.0, feature_penalty_weight=0.0,
    feature_grad_mult=1.0, learning_rate=5e-3, max_steps=1_000_000, warmup=32_000,
)  # fmt: skip

# San et al. 2024 (arXiv:2402.02302): w2v2-large-cpt_indic-70h.yaml of its repository, on the model of BASE.
CONTINUED = BASE | dict(
    min_seconds=1.0, crop_seconds=15.0, batch_hours=32 * 1_500_000 / 16_000 / 3600, learning_rate=1e-4,
    max_steps=10_000, warmup=7_500,
)  # fmt: skip

GRID = dict(length_grid_seconds=0.32)  # crops of few different lengths need less padding, and few compilations
SMALL = GRID | dict(
    # 1.27 M parameters: a model that two cores train.
    conv_dim=(64,) * 7, num_conv_pos_embeddings=32, num_conv_pos_embedding_groups=4, num_hidden_layers=4,
    hidden_size=144, intermediate_size=576, num_attention_heads=4, num_codevectors_per_group=64, codevector_dim=64,
    proj_codevector_dim=64,
    # So small a model needs no regularisation.
    hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, feat_quantizer_dropout=0.0, layerdrop=0.0,
    feature_penalty_weight=0.0,
    # Spans of ten frames are too long a gap for it. Codes sharpen before they are spread (docs/results.md).
    mask_time_length=5, max_gumbel_temperature=0.5, diversity_loss_weight=0.4, diversity_delay_steps=150,
    diversity_warmup_steps=2000,
    # Short sentences, 65 s an update, for half an hour on two cores.
    min_seconds=1.0, crop_seconds=5.0, batch_hours=0.018, learning_rate=1.5e-3, max_steps=3000, warmup=200,
)  # fmt: skip
RECIPES = {
    "base_librispeech": (BASE, GRID | dict(
        crop_seconds=15.38,  # the longest of the grid below 15.625 s
        num_attention_heads=12,  # as fairseq's code and the published checkpoint have
    )),
    "large_librispeech": (LARGE, GRID),
    # The paper's schedule for LV-60k, 3e-4 over 600,000 updates with 8 % of warm-up, in place of the file's.
    "large_librivox": (LIBRIVOX, GRID | dict(learning_rate=3e-4, max_steps=600_000, warmup=48_000)),
    "continue_language": (CONTINUED, GRID | dict(
        batch_hours=0.8333,  # rounded
        crop_seconds=15.38,  # as BASE's weights were trained
        num_attention_heads=12,
        max_gumbel_temperature=0.5,  # codes that are there are kept cold, where the source starts anew at 2.0
    )),
    "small": (BASE, SMALL),
    "medium": (BASE, GRID | dict(  # an hour of one GPU
        conv_dim=(256,) * 7, hidden_size=384, num_hidden_layers=9, num_attention_heads=6, intermediate_size=1536,
        crop_seconds=15.38, layerdrop=0.0, batch_hours=0.32, max_steps=20_000, warmup=2000, learning_rate=1e-3,
    )),
    "demo": (BASE, SMALL | dict(max_steps=700, warmup=100, diversity_warmup_steps=1200)),  # small, cut short
}  # fmt: skip


def resolve(name: str) -> dict:
    """All values of a recipe: its flags, its model's configuration, and what its feature extractor does."""
    path = PRETRAIN / f"{name}.yaml"
    start = ["--model_name_or_path=base"] * ("model_name_or_path" in path.read_text())  # the architecture of the Hub's
    (args,) = parse_command_line([PretrainArguments], [str(path), *start])
    config = build_config(args)
    values = asdict(args) | config.to_dict()
    values |= dict(conv_dim=tuple(config.conv_dim), conv_kernel=tuple(config.conv_kernel))
    values |= dict(conv_stride=tuple(config.conv_stride), warmup=num_warmup_steps(args.warmup_steps, args.max_steps))
    return values | {"do_normalize": load_feature_extractor(config.name_or_path, config).do_normalize}


@pytest.mark.parametrize("name", sorted(path.stem for path in PRETRAIN.glob("*.yaml")))
def test_a_recipe_holds_the_published_values(name):
    published, deviations = RECIPES[name]
    found = resolve(name)
    assert {key: found[key] for key in published} == published | deviations
    assert all(published[key] != value for key, value in deviations.items()), "no deviation: leave it out"

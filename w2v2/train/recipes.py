"""What is usual for a model of some size: batch, learning rate, warm-up and temperature of published recipes.

BASE and LARGE are the paper's (Baevski et al., 2020) and fairseq's; for smaller batches the learning rates are those of
arXiv 2402.13723. Small models are judged by configs/pretrain/small.yaml and demo.yaml, for BASE's recipe teaches
them nothing.
"""

from typing import NamedTuple

from w2v2.train.schedule import peak_rate

SMALL_WIDTH, LARGE_WIDTH = 512, 1024  # hidden_size below which a model is small, and from which it is large
MOST_EPOCHS = 1_000  # passes over the data


class Recipe(NamedTuple):
    """What is usual."""

    name: str  # `small`, `BASE` or `LARGE`
    batch_hours: float
    learning_rate: float  # peak, for the batch at hand
    warmup_steps: int  # of a run as long as this one
    feature_grad_mult: float
    coldest: float  # Gumbel temperature

    @classmethod
    def of(cls, config, batch_hours: float, max_steps: int) -> "Recipe":
        """The recipe for a model of this configuration, with an effective batch and a run of this size."""
        norms_first, is_large = config.do_stable_layer_norm, config.hidden_size >= LARGE_WIDTH
        mult, coldest = 1.0 if norms_first else 0.1, 0.1 if norms_first or is_large else 0.5
        if config.hidden_size < SMALL_WIDTH:
            rate = 1e-3 if batch_hours < 0.009 else 1.5e-3  # updates of 16 s and 65 s: docs/results.md
            return cls("small", 0.0045, rate, min(round(0.015 * max_steps), 60), mult, coldest)
        rate = min(3e-4 if is_large else 5e-4, peak_rate(batch_hours))
        return cls("LARGE" if is_large else "BASE", 1.6, rate, min(round(0.08 * max_steps), 32_000), mult, coldest)


def judge_epochs(epochs: float, hours: float) -> str:
    """What is to be said of so many passes over data of so many hours after cropping; "" where they are not too many."""
    if epochs <= MOST_EPOCHS:
        return ""
    return (
        f"the data ({hours:,.2f} h after cropping) are heard {epochs:,.0f} times, where {MOST_EPOCHS:,} passes are the limit: BASE heard "
        "LibriSpeech's 960 h some 670 times, and nobody has shown what more are worth"
    )

"""Whether the sizes in a configuration can be those of a model, before memory is taken for them: it may be anybody's `config.json`."""

from transformers import Wav2Vec2Config

from w2v2.errors import UserError
from w2v2.train import memory

MOST = 1 << 16  # of any width or number; published models stay below 8,192
MOST_LAYERS = 1_000
BYTES_PER_PARAMETER = 4
WIDTHS = (
    "hidden_size", "num_attention_heads", "intermediate_size", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups",
    "num_codevector_groups", "num_codevectors_per_group", "codevector_dim", "proj_codevector_dim", "num_negatives",
)  # fmt: skip
CONVS = ("conv_dim", "conv_kernel", "conv_stride")
DIVISORS = {
    "num_attention_heads": "hidden_size",
    "num_conv_pos_embedding_groups": "hidden_size",
    "num_codevector_groups": "codevector_dim",
}


def check_dimensions(config: Wav2Vec2Config, source: str) -> None:
    """Raises UserError, naming the key, for a size that no model has, or weights beyond this machine's memory."""
    for name, most in [("num_hidden_layers", MOST_LAYERS), *((name, MOST) for name in WIDTHS)]:
        if not _is_size(getattr(config, name), most):
            raise UserError(
                f"{source}: {name} is {_shown(getattr(config, name))}: it has to be a whole number from 1 to {most:,}"
            )
    for name in CONVS:
        sizes = getattr(config, name)
        if (
            not isinstance(sizes, list | tuple)
            or not 0 < len(sizes) <= 100
            or not all(_is_size(s, MOST) for s in sizes)
        ):
            raise UserError(
                f"{source}: {name} is {_shown(sizes)}: it has to be a list of whole numbers from 1 to {MOST:,}"
            )
    if len({len(getattr(config, name)) for name in CONVS}) > 1:
        raise UserError(f"{source}: {', '.join(CONVS)} differ in length: each has one number for each conv")
    for divisor, name in DIVISORS.items():
        if getattr(config, name) % getattr(config, divisor):
            raise UserError(
                f"{source}: {name} {getattr(config, name)} cannot be divided by {divisor} {getattr(config, divisor)}"
            )
    needed, room = BYTES_PER_PARAMETER * least_parameters(config), memory.available()
    if room is not None and needed > room:
        raise UserError(
            f"{source}: its weights take {needed / 1e9:,.1f} GB, and this machine has {room / 1e9:,.1f} GB left"
        )


def least_parameters(config: Wav2Vec2Config) -> int:
    """Matrices and kernels alone, without biases, norms and projections."""
    width, channels = config.hidden_size, [1, *config.conv_dim]
    convs = sum(a * b * k for a, b, k in zip(channels, config.conv_dim, config.conv_kernel, strict=False))
    position = width * width // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    layer = 4 * width * width + 2 * width * config.intermediate_size
    return convs + position + config.num_hidden_layers * layer


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"

"""Rotary position embeddings as config.json files describe them.

transformers 5 writes one object, `rope_parameters`; before, there were `rope_theta` and `rope_scaling`. Both are read.
"""

from dataclasses import replace

from megatron_rl.config.architecture import Rope
from megatron_rl.config.hf_config import HfConfig


def read_rope(config: HfConfig, dim: int, *, latent: bool, default_base: float, default_fraction: float | None) -> Rope:
    """The rotary embedding of heads with `dim` positional dimensions. `default_fraction` None: whole heads are rotated.

    Latent attention (DeepSeek) pairs neighbouring dimensions and knows YaRN alone.
    """
    rope = config.mapping(config.name_of("rope_scaling", "rope_parameters"))
    for name, value in rope.fields.items():
        if isinstance(value, dict):
            rope.refuse(name, "rotary embeddings that differ between layers are not supported")
    shape = Rope(
        base=rope.number("rope_theta", config.number("rope_theta", default_base)),
        fraction=_fraction(config, rope, default_fraction, dim),
        interleaved=latent,
    )
    type_field = rope.name_of("rope_type", "type")
    kind = str(rope.value(type_field, "default"))
    readers = {"default": _plain, "yarn": _yarn} if latent else _READERS
    if kind not in readers:
        rope.refuse(type_field, f"not supported; supported: {', '.join(readers)}")
    scaled: Rope = readers[kind](config, rope, shape)
    if latent and scaled.attention_factor is not None:
        rope.refuse("attention_factor", "not used by latent attention; mscale and mscale_all_dim say it")
    if scaled.scaling == "yarn" and scaled.fraction != 1.0:
        rope.refuse(type_field, f"not supported for heads that are rotated in part ({scaled.fraction:g}); supported: default")
    return scaled


def _fraction(config: HfConfig, rope: HfConfig, default: float | None, dim: int) -> float:
    name = "partial_rotary_factor"
    place = rope if name in rope.fields else config
    fraction: float = place.number(name, 1.0 if default is None else default)
    if default is None and fraction != 1:
        place.refuse(name, "not supported for this family; supported: 1")
    if fraction > 1 or int(dim * fraction) % 2 or int(dim * fraction) == 0:
        place.refuse(name, f"an even number of each head's {dim} dimensions must be rotated, not {dim * fraction:g}")
    return fraction


def _plain(config: HfConfig, rope: HfConfig, shape: Rope) -> Rope:
    return shape


def _linear(config: HfConfig, rope: HfConfig, shape: Rope) -> Rope:
    return replace(shape, scaling="linear", factor=rope.number("factor", minimum=1.0, exclusive=False))


def _original_positions(config: HfConfig, rope: HfConfig) -> int:
    name = "original_max_position_embeddings"
    positions: int = rope.integer(name, config.integer("max_position_embeddings"))
    return int(config.integer(name, positions))  # transformers lets a top-level field win


def _llama3(config: HfConfig, rope: HfConfig, shape: Rope) -> Rope:
    scaled = replace(
        _linear(config, rope, shape),
        scaling="llama3",
        original_max_positions=_original_positions(config, rope),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
    )
    # Megatron-core's RotaryEmbedding takes the factor alone and fixes the rest to the values of all Llama 3 releases.
    for name, value, fixed in (
        ("low_freq_factor", scaled.low_freq_factor, 1.0),
        ("high_freq_factor", scaled.high_freq_factor, 4.0),
        ("original_max_position_embeddings", scaled.original_max_positions, 8192),
    ):
        if value != fixed:
            rope.refuse(name, f"not supported for rope type llama3; supported: {fixed:g}")
    return scaled


def _yarn(config: HfConfig, rope: HfConfig, shape: Rope) -> Rope:
    """YaRN (https://arxiv.org/abs/2309.00071). Cosines and sines are scaled by attention_factor or, without it, by
    m(mscale)/m(mscale_all_dim) with m(x) = 0.1 x ln(factor) + 1; latent attention's softmax by m(mscale_all_dim)^2 too."""
    mscale, mscale_all_dim = rope.number("mscale", None), rope.number("mscale_all_dim", 0.0, exclusive=False)
    if mscale_all_dim and mscale is None:
        rope.refuse("mscale_all_dim", "implementations differ on what it means without mscale; give both or neither")
    if not mscale_all_dim and mscale not in (None, 1.0):
        rope.refuse("mscale", "implementations differ on what it means without mscale_all_dim; give both or neither")
    if not rope.flag("truncate", True):
        rope.refuse("truncate", "not supported; supported: true")
    return replace(
        _linear(config, rope, shape),
        scaling="yarn",
        original_max_positions=_original_positions(config, rope),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=1.0 if mscale is None else mscale,
        mscale_all_dim=mscale_all_dim,
        attention_factor=rope.number("attention_factor", None),
    )


_READERS = {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}

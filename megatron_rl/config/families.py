"""Model families: how each one's Hugging Face config.json becomes an `Architecture`.

`FAMILIES` has one declarative entry per `model_type`; what families share is read below it. What a family's modelling code
would compute differently from what is trained here is refused, naming the field: a model that is read is a model that is
computed exactly. References are the modelling files of transformers 5.12 and, where those are wrong, the authors' own code
and SGLang, which produces the rollouts.

Read and set aside: `num_nextn_predict_layers` (multi-token prediction layers are neither built nor trained),
`quantization_config` (a matter of the weights), the auxiliary-loss coefficients of pre-training (`moe.*` settings decide),
number formats and token ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_rl.config.architecture import Architecture, LatentAttention
from megatron_rl.config.hf_config import HfConfig, read_hf_config
from megatron_rl.config.hf_experts import ExpertFields, read_experts
from megatron_rl.config.hf_rope import read_rope


@dataclass(frozen=True)
class Family:
    """What is particular to a family. Fields not named here are read the same way for all (`_read`)."""

    architectures: tuple[str, ...]
    qkv_bias: bool | None = False  # None: attention_bias says
    qk_norm: Literal["none", "head", "full"] = "none"
    qk_norm_field: str | None = None  # a field that switches qk_norm on
    latent: bool = False
    kv_heads_optional: bool = False  # num_key_value_heads may be absent: as many as heads
    window_switch: bool = False  # sliding_window counts only when use_sliding_window is true
    rope_base: float = 10000.0  # rope_theta when it is absent
    rope_fraction: float | None = None  # partial_rotary_factor when absent; None: the family rotates whole heads
    experts: ExpertFields | None = None
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # fields and the values of them that are computed


# What no family may ask for: the values that are computed, the first being the default.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "router_jitter_noise": (0,),
    "use_sliding_window": (False,),
    "dual_chunk_attention_config": (None,),
}

_SIGMOID_EXPERTS = ExpertFields(
    count=("n_routed_experts", "num_local_experts"),
    layers="after_dense",
    scoring="sigmoid",
    normalize_default=True,
    expert_bias=True,
    group_score="top2_sum",
    shared=True,
)

_DEEPSEEK_V3 = Family(
    ("DeepseekV3ForCausalLM",),
    latent=True,
    experts=_SIGMOID_EXPERTS,
    only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "rope_interleave": (True,)},
)

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(("Qwen2ForCausalLM",), qkv_bias=True, window_switch=True),
    "qwen3": Family(("Qwen3ForCausalLM",), qk_norm="head", window_switch=True),
    "qwen3_moe": Family(
        ("Qwen3MoeForCausalLM",),
        qk_norm="head",
        window_switch=True,
        experts=ExpertFields(count=("num_experts", "num_local_experts"), layers="sparse_step"),
    ),
    "llama": Family(("LlamaForCausalLM",), kv_heads_optional=True),
    "mixtral": Family(
        ("MixtralForCausalLM",),
        rope_base=1e6,
        experts=ExpertFields(
            count=("num_local_experts", "num_experts"), layers="all", hidden="intermediate_size", normalize=True
        ),
    ),
    "olmoe": Family(
        ("OlmoeForCausalLM",),
        qk_norm="full",
        kv_heads_optional=True,
        experts=ExpertFields(count=("num_experts", "num_local_experts"), layers="all", hidden="intermediate_size"),
    ),
    "deepseek_v2": Family(
        ("DeepseekV2ForCausalLM",),
        latent=True,
        kv_heads_optional=True,
        experts=ExpertFields(
            count=("n_routed_experts", "num_local_experts"), layers="after_dense", group_score="max", shared=True
        ),
        # With norm_topk_prob the authors' code leaves out routed_scaling_factor, and transformers leaves out the norm.
        only={
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
        },
    ),
    "deepseek_v3": _DEEPSEEK_V3,  # and Moonlight
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": Family(
        ("Glm4MoeForCausalLM",),
        qkv_bias=None,
        qk_norm="head",
        qk_norm_field="use_qk_norm",
        rope_fraction=0.5,
        experts=_SIGMOID_EXPERTS,
        only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ),
}


def read_architecture(path: Path) -> Architecture:
    """Read the architecture that a config.json (or the folder that holds it) describes, or say what stands against it."""
    config = read_hf_config(path)
    name = str(config.value("model_type"))
    if name not in FAMILIES:
        config.refuse("model_type", f"not a supported family; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    architectures = config.value("architectures", list(family.architectures))
    if not isinstance(architectures, list) or not any(known in architectures for known in family.architectures):
        config.refuse("architectures", f"not supported for model_type {name}; supported: {' or '.join(family.architectures)}")
    # Where attention_bias is not a matter of the family it also puts a bias on the output projection, which is not built.
    attention_bias = {} if family.qkv_bias is None else {"attention_bias": (False,)}
    _check_values(config, {**_ONLY, **family.only, **attention_bias})
    _check_attention_span(config, family)
    return _read(config, name, family)


def _check_values(config: HfConfig, only: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in only.items():
        if config.value(name, values[0]) not in values:
            supported = " or ".join("null" if value is None else str(value).lower() for value in values)
            config.refuse(name, f"not supported; supported: {supported}")


def _check_attention_span(config: HfConfig, family: Family) -> None:
    """Every token attends to all before it; a window as long as the longest sequence is no window."""
    longest = config.integer("max_position_embeddings")
    if not family.window_switch and config.integer("sliding_window", longest) < longest:
        config.refuse("sliding_window", f"sliding-window attention is not supported; supported: null, or at least {longest}")
    kinds = config.value("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        config.refuse("layer_types", 'not supported; supported: "full_attention" for every layer')


def _read(config: HfConfig, name: str, family: Family) -> Architecture:
    layers, hidden, heads = (config.integer(field) for field in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    latent = _latent_attention(config) if family.latent else None
    head_dim = latent.qk_head_dim + latent.qk_rope_head_dim if latent else _head_dim(config, hidden, heads)
    architecture = Architecture(
        family=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, family, heads),
        head_dim=head_dim,
        ffn_hidden=config.integer("intermediate_size"),
        vocab=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps"),
        rope=read_rope(
            config,
            latent.qk_rope_head_dim if latent else head_dim,
            latent=family.latent,
            default_base=family.rope_base,
            default_fraction=family.rope_fraction,
        ),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=config.flag("attention_bias", False) if family.qkv_bias is None else family.qkv_bias,
        qk_norm=family.qk_norm if family.qk_norm_field is None or config.flag(family.qk_norm_field, False) else "none",
        init_std=config.number("initializer_range", 0.02),
        moe_layers=(False,) * layers,
        latent_attention=latent,
    )
    if family.qk_norm == "full" and heads * head_dim != hidden:
        config.refuse("head_dim", f"the query norm is {hidden} wide (hidden_size), so {heads} heads must be that wide together")
    if family.experts is None:
        return architecture
    experts, moe_layers = read_experts(config, family.experts, layers)
    return replace(architecture, experts=experts, moe_layers=moe_layers)


def _kv_heads(config: HfConfig, family: Family, heads: int) -> int:
    name = "num_key_value_heads"
    if not family.kv_heads_optional:
        config.require(name)
    kv_heads: int = config.integer(name, heads)
    if heads % kv_heads:
        config.refuse(name, f"must divide num_attention_heads={heads}")
    if family.latent and kv_heads != heads:
        config.refuse(name, f"latent attention has as many key-value heads as heads: expected {heads}")
    return kv_heads


def _head_dim(config: HfConfig, hidden: int, heads: int) -> int:
    if config.value("head_dim", None) is None and hidden % heads:
        config.refuse("num_attention_heads", f"must divide hidden_size={hidden} when head_dim is not given")
    head_dim: int = config.integer("head_dim", hidden // heads)
    if head_dim % 2:
        config.refuse("head_dim", f"rotary embeddings need an even head size, not {head_dim}")
    return head_dim


def _latent_attention(config: HfConfig) -> LatentAttention:
    config.require("q_lora_rank")
    rotated: int = config.integer("qk_rope_head_dim")
    if rotated % 2:
        config.refuse("qk_rope_head_dim", "rotary embeddings need an even size")
    return LatentAttention(
        q_lora_rank=config.integer("q_lora_rank", None),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_head_dim=config.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rotated,
        v_head_dim=config.integer("v_head_dim"),
    )

"""What a model is, in neutral words: the shape that an HF config.json describes.

`Architecture` is read from the config alone, without torch, so that settings can be checked, layouts planned and parameters
counted before anything is loaded. The policy turns it into Megatron's TransformerConfig; `config.families` reads it from
each model family's own field names.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `scaling` names the rule that stretches it."""

    base: float
    scaling: Literal["none", "llama3", "yarn", "linear"] = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 1.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor
    fraction: float = 1.0  # share of each head that is rotated (GLM: 0.5)
    interleaved: bool = False  # True: pairs are neighbours in the HF weights (DeepSeek), False: halves (Llama)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): queries, keys and values go through low-rank bottlenecks."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_head_dim: int  # without rotary part
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a layer and its router."""

    count: int
    top_k: int
    hidden: int  # width of one expert
    scoring: Literal["softmax", "sigmoid"]
    normalize_top_k: bool  # chosen weights are rescaled to sum to one
    softmax_before_top_k: bool  # True: softmax over all experts, then choose; False: choose, then softmax over the chosen
    scaling_factor: float = 1.0
    expert_bias: bool = False  # a bias that steers the choice only (noaux_tc)
    groups: int | None = None  # group-limited choice
    top_k_groups: int | None = None
    group_score: Literal["max", "top2_sum"] = "top2_sum"  # how a group is scored (DeepSeek-V2: max, V3: sum of two best)
    shared_hidden: int = 0  # total width of the shared experts
    shared_gate: bool = False


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm and gated SiLU feed-forward layers."""

    family: str  # HF model_type
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int  # width of dense feed-forward layers
    vocab: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # head: over each head (Qwen3); full: over all heads together (OLMoE)
    init_std: float = 0.02
    experts: Experts | None = None
    moe_layers: tuple[bool, ...] = ()  # for each layer: does it hold experts
    latent_attention: LatentAttention | None = None

    @property
    def is_moe(self) -> bool:
        return any(self.moe_layers)

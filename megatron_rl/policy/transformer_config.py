"""The one place where an `Architecture` and the settings become Megatron-core's configuration.

Each function returns the fields of one concern as a table; `build_transformer_config` joins them. Fields that are left out
keep Megatron's default on purpose: fused softmax and persistent norms belong to layers that are not built here, and a fused
router would not choose as the replayed one does. Settings are checked by `config.checks`; what is refused here is what only
the machine or Megatron itself can tell.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.utils import init_method_normal

from megatron_rl.config.architecture import Architecture, Experts, Rope
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.layout_map import padded_vocab
from megatron_rl.config.settings import LayoutSettings, MoeSettings, PrecisionSettings, RecomputeSettings, Settings

# Transformer Engine's number format by recipe. Scaling by blocks is fine enough for e4m3 gradients (DeepSeek-V3, MXFP8);
# one scale a tensor is not, so gradients take e5m2's range (hybrid).
_FP8_FORMAT = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


@dataclass
class YarnTransformerConfig(TransformerConfig):
    """TransformerConfig with the attributes that GPTModel and its attention look for under YaRN."""

    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True


def build_transformer_config(
    architecture: Architecture, settings: Settings, *, cuda: bool, transformer_engine: bool
) -> TransformerConfig:
    """Megatron's configuration of a model under a layout, on a GPU or not, with Transformer Engine's layers or torch's."""
    config_class, fields = transformer_fields(architecture, settings, cuda=cuda, transformer_engine=transformer_engine)
    try:
        return config_class(**fields)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise SettingsError(f"Megatron-core refuses these settings: {error}") from error


def transformer_fields(
    architecture: Architecture, settings: Settings, *, cuda: bool, transformer_engine: bool
) -> tuple[type[TransformerConfig], dict[str, Any]]:
    """The class of the configuration and its fields."""
    fields = {
        **_shape(architecture),
        **_parallel(settings.layout),
        **_precision(settings.precision, transformer_engine),
        **_recompute(settings.recompute),
        **_kernels(architecture, cuda, transformer_engine),
    }
    if architecture.experts is not None:
        fields |= _experts(architecture, architecture.experts, settings.moe, cuda)
    if architecture.latent_attention is not None:
        return MLATransformerConfig, fields | _latent_attention(architecture)
    if architecture.rope.scaling == "yarn":
        return YarnTransformerConfig, fields | _yarn(architecture.rope)
    return TransformerConfig, fields


def gpt_model_arguments(architecture: Architecture) -> dict[str, Any]:
    """The arguments of GPTModel that describe the model itself."""
    rope = architecture.rope
    yarn_outside_attention = rope.scaling == "yarn" and architecture.latent_attention is None  # latent attention has its own
    return {
        "vocab_size": padded_vocab(architecture.vocab),
        "max_sequence_length": architecture.max_positions,
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
        "position_embedding_type": "yarn" if yarn_outside_attention else "rope",
        "rotary_base": rope.base,
        "rotary_percent": rope.fraction,
        "rope_scaling": rope.scaling == "llama3",
        "rope_scaling_factor": rope.factor,
        "seq_len_interpolation_factor": rope.factor if rope.scaling == "linear" else None,
    }


# -- the model ---------------------------------------------------------------------------------------------------------


def _shape(architecture: Architecture) -> dict[str, Any]:
    normal = init_method_normal(architecture.init_std)
    return {
        "num_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "ffn_hidden_size": architecture.ffn_hidden,
        "num_attention_heads": architecture.heads,
        "num_query_groups": architecture.kv_heads,
        "kv_channels": architecture.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        # Latent attention's norms are part of its up-projections, not of this switch.
        "qk_layernorm": architecture.qk_norm != "none" and architecture.latent_attention is None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # As transformers does: one standard deviation for every matrix (Megatron's default shrinks output projections).
        "init_method": normal,
        "output_layer_init_method": normal,
        "init_method_std": architecture.init_std,
    }


def _latent_attention(architecture: Architecture) -> dict[str, Any]:
    """Multi-head latent attention. Megatron pairs neighbouring rotary dimensions there, as the HF weights are laid out, and
    scales the softmax by YaRN's m(mscale_all_dim)^2 as the authors and SGLang do."""
    latent, rope = architecture.latent_attention, architecture.rope
    assert latent is not None
    if rope.scaling not in ("none", "yarn") or not rope.interleaved:
        raise SettingsError(f"policy.config: {architecture.family}: latent attention needs interleaved rope, plain or YaRN")
    fields = {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "yarn" if rope.scaling == "yarn" else "rope",
        "rotary_base": rope.base,
        "rotary_scaling_factor": rope.factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
    if rope.scaling == "yarn":
        fields |= {
            "original_max_position_embeddings": rope.original_max_positions,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
    return fields


def _yarn(rope: Rope) -> dict[str, Any]:
    mscale, mscale_all_dim = rope.mscale, rope.mscale_all_dim
    if rope.attention_factor is not None and rope.factor > 1:
        # Megatron scales cosines and sines by (0.1 mscale ln f + 1) / (0.1 mscale_all_dim ln f + 1): solve for mscale.
        mscale, mscale_all_dim = (rope.attention_factor - 1) / (0.1 * math.log(rope.factor)), 0.0
    return {
        "yarn_rotary_scaling_factor": rope.factor,
        "yarn_original_max_position_embeddings": rope.original_max_positions,
        "yarn_beta_fast": rope.beta_fast,
        "yarn_beta_slow": rope.beta_slow,
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": mscale_all_dim,
    }


def _experts(architecture: Architecture, experts: Experts, moe: MoeSettings, cuda: bool) -> dict[str, Any]:
    if moe.dispatcher == "flex" and not cuda:
        raise SettingsError("moe.dispatcher=flex is DeepEP, which needs a GPU; use alltoall")
    return {
        "num_moe_experts": experts.count,
        "moe_layer_freq": [int(moe_layer) for moe_layer in architecture.moe_layers],
        "moe_ffn_hidden_size": experts.hidden,
        "moe_shared_expert_intermediate_size": experts.shared_hidden or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_router_dtype": "fp32",
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": experts.scoring,
        # Softmax over the chosen is softmax over all rescaled to sum to one; Megatron rescales sigmoid weights always.
        "moe_router_pre_softmax": experts.softmax_before_top_k and not experts.normalize_top_k,
        "moe_router_topk_scaling_factor": experts.scaling_factor if experts.scaling_factor != 1.0 else None,
        "moe_router_enable_expert_bias": experts.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coefficient,
        "moe_z_loss_coeff": moe.z_loss_coefficient or None,
        "moe_router_num_groups": experts.groups,  # `group_choice` says how groups are ranked
        "moe_router_group_topk": experts.top_k_groups,
    }


# -- layout ------------------------------------------------------------------------------------------------------------


def _parallel(layout: LayoutSettings) -> dict[str, Any]:
    interleaved = layout.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel_on,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if interleaved else None,
        "pipeline_model_parallel_layout": _pipeline_layout(layout),
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "calculate_per_token_loss": True,  # the objective's own divisor counts; Megatron must not divide again
        "variable_seq_lengths": layout.pipeline > 1,  # packs differ in length
        # Megatron checks its default dispatcher, which wants one length, even for models without experts.
        "moe_token_dispatcher_type": "alltoall",
        # Megatron's default for the interleaved schedule (batched, not overlapped) is silently wrong over gloo.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _pipeline_layout(layout: LayoutSettings) -> list[list[str]] | None:
    """Megatron's form of an explicit split: the layers of every chunk in model order. None: layers divide evenly."""
    if layout.pipeline_layers is None:
        return None
    chunks = [["decoder"] * layers for layers in layout.pipeline_layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


# -- numbers and kernels -----------------------------------------------------------------------------------------------


def _precision(precision: PrecisionSettings, transformer_engine: bool) -> dict[str, Any]:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision.dtype]
    fields = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
    }
    return fields | _fp8(precision, transformer_engine) if precision.fp8 == "transformer_engine" else fields


def _fp8(precision: PrecisionSettings, transformer_engine: bool) -> dict[str, Any]:
    if not transformer_engine:
        raise SettingsError("precision.fp8=transformer_engine, but Transformer Engine is not in use here; use simulated or off")
    first, last = precision.fp8_skip_first_layers, precision.fp8_skip_last_layers
    return {
        "fp8": _FP8_FORMAT[precision.fp8_recipe],
        "fp8_recipe": precision.fp8_recipe,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def _recompute(recompute: RecomputeSettings) -> dict[str, Any]:
    if recompute.mode == "none":
        return {}
    if recompute.mode == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": recompute.method,
            "recompute_num_layers": recompute.layers,
        }
    return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}


def _kernels(architecture: Architecture, cuda: bool, transformer_engine: bool) -> dict[str, Any]:
    rope = architecture.rope
    # Megatron's fused rotary path drops YaRN's scale on packed sequences; partly rotated heads and MLA stay unfused too.
    whole_heads = architecture.latent_attention is None and rope.fraction == 1.0
    return {
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        "use_cpu_initialization": not cuda,
        "bias_activation_fusion": cuda,
        "bias_dropout_fusion": cuda,
        "apply_rope_fusion": transformer_engine and whole_heads and rope.scaling != "yarn",
        "moe_permute_fusion": transformer_engine and architecture.is_moe,
        # The extension of NVIDIA's apex, by which it is told from the unrelated PyPI package of that name.
        "gradient_accumulation_fusion": cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    }

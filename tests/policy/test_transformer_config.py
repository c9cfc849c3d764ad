"""Megatron's configuration from an architecture and settings: accepted for every family under every kind of layout, and
saying what the architecture says. That the numbers come out right is tested in test_against_transformers.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.policy.transformer_config import (
    build_transformer_config,
    gpt_model_arguments,
    transformer_fields,
)
from tests.reference.oracle import hf_config
from tests.reference.tiny import TINY, write_tiny_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tensor": {"layout": {"tensor": 2}},
    "pipeline": {"layout": {"pipeline": 2}},
    "uneven pipeline": {"layout": {"pipeline": 2, "pipeline_layers": [1, 3]}},
    "virtual pipeline": {"layout": {"pipeline": 2, "virtual_pipeline": 2}},
    "context": {"layout": {"context": 2}},
    "bfloat16": {"precision": {"dtype": "bfloat16"}},
    "recompute": {"recompute": {"mode": "full", "layers": 2}},
    "selective": {"recompute": {"mode": "selective", "modules": ["core_attn", "layernorm"]}},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "expert": {"layout": {"expert": 2}},
    "expert tensor": {"layout": {"tensor": 2, "expert": 2, "expert_tensor": 2}},
    "allgather": {"moe": {"dispatcher": "allgather"}, "layout": {"expert": 2}},
    "balanced": {"moe": {"aux_loss_coefficient": 0.01, "z_loss_coefficient": 0.001}},
    "recompute experts": {"recompute": {"mode": "selective", "modules": ["moe_act", "moe"]}},
}


def settings(path: Path, **sections: Any) -> Settings:
    return Settings.model_validate({"policy": {"config": path}, "precision": {"dtype": "float32"}, **sections})


def tiny(name: str, folder: Path, **changes: Any) -> Architecture:
    return read_architecture(write_tiny_config(name, folder, **changes))


def build(name: str, folder: Path, **sections: Any) -> TransformerConfig:
    architecture = tiny(name, folder)
    return build_transformer_config(architecture, settings(folder, **sections), cuda=False, transformer_engine=False)


def gpu_fields(name: str, folder: Path, **sections: Any) -> dict[str, Any]:
    architecture = tiny(name, folder)
    return transformer_fields(architecture, settings(folder, **sections), cuda=True, transformer_engine=True)[1]


@pytest.mark.parametrize("name", TINY)
def test_megatron_accepts_every_family_under_every_layout(name: str, tmp_path: Path) -> None:
    architecture = tiny(name, tmp_path)
    layouts = {**LAYOUTS, **(EXPERT_LAYOUTS if architecture.is_moe else {})}
    for sections in layouts.values():
        config = build(name, tmp_path, **sections)
        layout = sections.get("layout", {})
        assert config.tensor_model_parallel_size == layout.get("tensor", 1)
        assert config.sequence_parallel == (layout.get("tensor", 1) > 1)
        assert config.pipeline_model_parallel_size == layout.get("pipeline", 1)
        assert config.expert_tensor_parallel_size == layout.get("expert_tensor", 1)
        assert config.calculate_per_token_loss and config.use_cpu_initialization


def test_packs_of_a_pipeline_differ_in_length(tmp_path: Path) -> None:
    assert not build("qwen3", tmp_path).variable_seq_lengths
    assert build("qwen3", tmp_path, layout={"pipeline": 2}).variable_seq_lengths


def test_interleaved_schedule_never_batches_communication(tmp_path: Path) -> None:
    """Batched and not overlapped, Megatron's default, gives wrong numbers over gloo without a word."""
    config = build("qwen3", tmp_path, layout={"pipeline": 2, "virtual_pipeline": 2})
    assert config.overlap_p2p_comm and not config.batch_p2p_comm
    assert config.virtual_pipeline_model_parallel_size == 2
    assert build("qwen3", tmp_path, layout={"pipeline": 2}).virtual_pipeline_model_parallel_size is None


def test_explicit_pipeline_split(tmp_path: Path) -> None:
    split = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [0, 1, 1, 2]}
    layout = build("qwen3", tmp_path, layout=split).pipeline_model_parallel_layout
    names = [[[layer.name for layer in chunk] for chunk in stage] for stage in layout.layout]
    # Stage 0 holds chunks 0 and 2 of the model, stage 1 chunks 1 and 3.
    assert names == [[["embedding"], ["decoder"]], [["decoder"], ["decoder", "decoder", "loss"]]]


def test_which_layers_hold_experts(tmp_path: Path) -> None:
    assert build("deepseek_v3", tmp_path).moe_layer_freq == [0, 1, 1, 1]
    assert build("qwen3_moe_mixed", tmp_path).moe_layer_freq == [0, 1, 0, 0]
    assert build("qwen3", tmp_path).num_moe_experts is None


def test_routing(tmp_path: Path) -> None:
    mixtral, olmoe = build("mixtral", tmp_path), build("olmoe", tmp_path)
    assert not mixtral.moe_router_pre_softmax and olmoe.moe_router_pre_softmax
    v3 = build("deepseek_v3", tmp_path, moe={"expert_bias_update_rate": 0.001})
    assert (v3.moe_router_score_function, v3.moe_router_enable_expert_bias) == ("sigmoid", True)
    assert (v3.moe_router_num_groups, v3.moe_router_group_topk, v3.moe_router_topk_scaling_factor) == (4, 2, 2.5)
    assert v3.moe_router_bias_update_rate == 0.001 and v3.moe_shared_expert_intermediate_size == 64
    assert {config.moe_router_dtype for config in (mixtral, olmoe, v3)} == {"fp32"}
    assert (olmoe.moe_router_load_balancing_type, olmoe.moe_z_loss_coeff) == ("none", None)
    balanced = build("olmoe", tmp_path, moe={"aux_loss_coefficient": 0.01, "z_loss_coefficient": 0.1})
    assert (balanced.moe_router_load_balancing_type, balanced.moe_aux_loss_coeff) == ("aux_loss", 0.01)
    assert balanced.moe_z_loss_coeff == 0.1


def test_latent_attention(tmp_path: Path) -> None:
    config = build("deepseek_v3", tmp_path)
    assert isinstance(config, MLATransformerConfig)
    widths = (config.q_lora_rank, config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim)
    assert widths == (40, 24, 16, 8, 12)
    assert (config.rope_type, config.rotary_scaling_factor, config.original_max_position_embeddings) == ("yarn", 4.0, 64)
    plain = build("moonlight", tmp_path)
    assert isinstance(plain, MLATransformerConfig)
    assert (plain.rope_type, plain.q_lora_rank, plain.rotary_base) == ("rope", None, 1000.0)


@pytest.mark.parametrize(
    "yarn",
    [
        {},
        {"attention_factor": 1.3},
        {"attention_factor": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 0.9},
        {"mscale": 0.7, "mscale_all_dim": 0.9, "attention_factor": 0.8},
    ],
)
def test_yarn_scales_attention_as_transformers_does(yarn: dict[str, float], tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **yarn}
    architecture = tiny("qwen3", tmp_path, rope_scaling=scaling)
    config = build_transformer_config(architecture, settings(tmp_path), cuda=False, transformer_engine=False)
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](hf_config({**TINY["qwen3"], "rope_scaling": dict(scaling)}))
    assert _yarn_get_concentration_factor_from_config(config) == pytest.approx(expected, rel=1e-12)
    assert gpt_model_arguments(architecture)["position_embedding_type"] == "yarn"


def test_model_arguments(tmp_path: Path) -> None:
    assert gpt_model_arguments(tiny("llama", tmp_path)) == {
        "vocab_size": 128,
        "max_sequence_length": 16384,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
        "rotary_base": 50000.0,
        "rotary_percent": 1.0,
        "rope_scaling": True,
        "rope_scaling_factor": 8.0,
        "seq_len_interpolation_factor": None,
    }
    linear = gpt_model_arguments(tiny("llama_linear", tmp_path))
    assert (linear["rope_scaling"], linear["seq_len_interpolation_factor"]) == (False, 2.0)
    assert gpt_model_arguments(tiny("glm4_moe", tmp_path))["rotary_percent"] == 0.5
    assert gpt_model_arguments(tiny("qwen2", tmp_path))["share_embeddings_and_output_weights"] is True
    # Latent attention makes its own embedding; the model's would look for YaRN's fields and not find them.
    assert gpt_model_arguments(tiny("deepseek_v3", tmp_path))["position_embedding_type"] == "rope"


def test_number_formats(tmp_path: Path) -> None:
    full, half = build("qwen3", tmp_path), build("qwen3", tmp_path, precision={"dtype": "bfloat16"})
    assert (full.params_dtype, full.pipeline_dtype, full.bf16, full.fp8) == (torch.float32, torch.float32, False, None)
    assert (half.params_dtype, half.pipeline_dtype, half.bf16, half.fp8) == (torch.bfloat16, torch.bfloat16, True, None)


@pytest.mark.parametrize(
    ("recipe", "number_format"), [("tensorwise", "hybrid"), ("delayed", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")]
)
def test_fp8(recipe: str, number_format: str, tmp_path: Path) -> None:
    precision = {"dtype": "bfloat16", "fp8": "transformer_engine", "fp8_recipe": recipe}
    fields = gpu_fields("qwen3", tmp_path, precision=precision)
    assert (fields["fp8"], fields["fp8_recipe"], fields["first_last_layers_bf16"]) == (number_format, recipe, False)
    TransformerConfig(**{**fields, "apply_rope_fusion": False})  # Megatron takes it; the fused kernel is not on this machine


def test_fp8_skips_layers(tmp_path: Path) -> None:
    precision = {"dtype": "bfloat16", "fp8": "transformer_engine", "fp8_skip_first_layers": 2, "fp8_skip_last_layers": 0}
    fields = gpu_fields("qwen3", tmp_path, precision=precision)
    assert (fields["num_layers_at_start_in_bf16"], fields["num_layers_at_end_in_bf16"]) == (2, 0)
    assert fields["first_last_layers_bf16"]


def test_fp8_is_simulated_without_megatron_knowing(tmp_path: Path) -> None:
    assert build("qwen3", tmp_path, precision={"dtype": "bfloat16", "fp8": "simulated"}).fp8 is None


def test_fused_kernels_only_where_they_compute_the_same(tmp_path: Path) -> None:
    rope = {name: gpu_fields(name, tmp_path)["apply_rope_fusion"] for name in TINY}
    unfused = {
        "qwen3_yarn",
        "qwen3_moe_mixed",
        "glm4_moe",
        *(name for name, fields in TINY.items() if "kv_lora_rank" in fields),
    }
    assert {name for name, fused in rope.items() if not fused} == unfused
    assert gpu_fields("mixtral", tmp_path)["moe_permute_fusion"] and not gpu_fields("qwen3", tmp_path)["moe_permute_fusion"]
    config = build("mixtral", tmp_path)
    fusions = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "moe_permute_fusion", "persist_layer_norm")
    assert not any(getattr(config, name) for name in (*fusions, "gradient_accumulation_fusion", "masked_softmax_fusion"))


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("mixtral", {"moe": {"dispatcher": "flex"}}, "moe.dispatcher=flex is DeepEP, which needs a GPU"),
        ("mixtral", {"moe": {"dispatcher": "allgather"}, "layout": {"pipeline": 2}}, "Megatron-core refuses these settings"),
        ("qwen3", {"layout": {"expert": 2}}, "Megatron-core refuses these settings: num_moe_experts"),
        ("qwen3", {"precision": {"dtype": "bfloat16", "fp8": "transformer_engine"}}, "Transformer Engine is not in use here"),
    ],
)
def test_refused(name: str, sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        build(name, tmp_path, **sections)

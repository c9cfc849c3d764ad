"""Parameter counts against models that transformers builds, and of ranks against the whole."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.architecture import Architecture, Experts, LatentAttention, Rope
from megatron_rl.config.counting import (
    Parameters,
    Shards,
    active_parameters,
    layer_parameters,
    model_parameters,
    stage_parameters,
)
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import LayoutSettings

SMALL: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 100, "vocab_size": 97,
    "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 6, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10,
    "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("Llama", {"num_key_value_heads": 2, "head_dim": 12}),
    "tied embeddings": ("Llama", {"num_key_value_heads": 3, "tie_word_embeddings": True}),
    "biased queries": ("Qwen2", {"num_key_value_heads": 2}),
    "normed heads": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "experts": ("Qwen3Moe", {**EXPERTS, "num_experts": 8, "num_key_value_heads": 2, "head_dim": 16}),
    "experts in some layers": ("Qwen3Moe", {**EXPERTS, "num_experts": 8, "num_key_value_heads": 2, "mlp_only_layers": [1]}),
    "Mixtral": ("Mixtral", {"num_experts_per_tok": 2, "num_local_experts": 4, "num_key_value_heads": 2}),
    "full norm": ("Olmoe", {"num_experts_per_tok": 2, "num_experts": 8, "num_key_value_heads": 6}),
    "latent attention": ("DeepseekV3", {**EXPERTS, **LATENT, "q_lora_rank": 24}),
    "latent attention, whole queries": ("DeepseekV3", {**EXPERTS, **LATENT, "q_lora_rank": None}),
    "GLM": (
        "Glm4Moe",
        {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "num_key_value_heads": 2, "head_dim": 16, "use_qk_norm": True,
         "attention_bias": True, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family, fields", CONFIGS.values(), ids=CONFIGS)
def test_counts_are_those_of_transformers(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **fields})
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    parameters = dict(model.named_parameters())
    counted = model_parameters(architecture)
    assert counted.total == sum(parameter.numel() for parameter in parameters.values())
    kinds = {
        "embedding": ("embed_tokens",),
        "output": ("lm_head",),
        "attention": ("_proj", "self_attn"),
        "norms": ("norm",),
        "shared_experts": ("shared_expert",),
        "experts": (".mlp.experts.", ".block_sparse_moe.experts."),
    }
    for kind, words in kinds.items():
        theirs = {name: parameter.numel() for name, parameter in parameters.items() if any(word in name for word in words)}
        if kind == "attention":
            theirs = {name: size for name, size in theirs.items() if "self_attn" in name and "norm" not in name}
        assert getattr(counted, kind) == sum(theirs.values()), kind


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    chosen, all_experts = 2 * 3 * 48 * 20 * 3, 8 * 3 * 48 * 20 * 3  # experts x matrices x hidden x width x layers
    assert active_parameters(MOE) == model_parameters(MOE).total - all_experts + chosen
    assert active_parameters(DENSE) == model_parameters(DENSE).total


DENSE = Architecture(
    family="llama", layers=3, hidden=48, heads=8, kv_heads=4, head_dim=12, ffn_hidden=96, vocab=96, max_positions=64,
    norm_eps=1e-6, rope=Rope(base=1e4), tied_embeddings=False, qkv_bias=True, qk_norm="head",
)  # fmt: skip
MOE = replace(
    DENSE, moe_layers=(True,) * 3,
    experts=Experts(
        count=8, top_k=2, hidden=20, scoring="softmax", normalize_top_k=True, softmax_before_top_k=False, shared_hidden=40,
        shared_gate=True,
    ),
)  # fmt: skip
MLA = replace(
    MOE, latent_attention=LatentAttention(24, 16, qk_head_dim=12, qk_rope_head_dim=4, v_head_dim=10), qkv_bias=False,
    qk_norm="none",
)  # fmt: skip


@settings(deadline=None)
@given(
    model=st.sampled_from([DENSE, MOE, MLA]),
    pipeline_layers=st.sampled_from([(3,), (1, 2), (0, 3), (1, 1, 1), (1, 0, 1, 1)]),
    tied=st.booleans(),
)
def test_stages_add_up_to_the_model(model: Architecture, pipeline_layers: tuple[int, ...], tied: bool) -> None:
    model = replace(model, tied_embeddings=tied)
    layout = LayoutSettings(pipeline=len(pipeline_layers), pipeline_layers=pipeline_layers)
    held = sum(stage_parameters(layout, model), start=Parameters())
    whole = model_parameters(replace(model, vocab=128))  # as padded
    copied = 128 * model.hidden if tied and layout.pipeline > 1 else 0  # a tied output layer has its own copy
    assert held == replace(whole, output=whole.output + copied)


@settings(deadline=None)
@given(
    model=st.sampled_from([DENSE, MOE]),
    tensor=st.sampled_from([1, 2, 4]),
    expert=st.sampled_from([1, 2, 8]),
    expert_tensor=st.sampled_from([1, 2, 4]),
)
def test_shards_add_up_to_a_layer(model: Architecture, tensor: int, expert: int, expert_tensor: int) -> None:
    whole, shard = layer_parameters(model, 0), layer_parameters(model, 0, Shards(tensor, expert, expert_tensor))
    shared_gate = model.hidden if model.experts else 0  # whole on every tensor rank
    gathered = {
        "attention": shard.attention * tensor,
        "dense": shard.dense * tensor,
        "shared_experts": (shard.shared_experts - shared_gate) * tensor + shared_gate,
        "experts": shard.experts * expert * expert_tensor,
        "router": shard.router,
        "norms": shard.norms,
    }
    for kind in fields(Parameters):
        assert gathered.get(kind.name, 0) == getattr(whole, kind.name), kind.name


def test_the_vocabulary_is_padded_and_cut_over_tensor_ranks() -> None:
    held = stage_parameters(LayoutSettings(tensor=4), replace(DENSE, vocab=129))[0]
    assert held.embedding == held.output == 256 // 4 * DENSE.hidden


def test_latent_bottlenecks_are_whole_on_every_tensor_rank() -> None:
    whole, shard = layer_parameters(MLA, 0).attention, layer_parameters(MLA, 0, Shards(tensor=2)).attention
    down = MLA.hidden * (24 + 16 + 4)
    assert 2 * (shard - down) + down == whole

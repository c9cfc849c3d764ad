"""Reading config.json files: old and new field names mean the same, and what cannot be computed is refused by name.

That what is read is right is judged by numbers, in tests/policy/test_against_transformers.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.architecture import Architecture, Experts, LatentAttention
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import FAMILIES, read_architecture
from tests.reference.oracle import hf_config
from tests.reference.tiny import TINY, write_tiny_config


def read(name: str, folder: Path, **changes: Any) -> Architecture:
    return read_architecture(write_tiny_config(name, folder, **changes))


def refusal(name: str, folder: Path, **changes: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        read(name, folder, **changes)
    return str(caught.value)


def test_every_family_has_a_tiny_model() -> None:
    assert {fields["model_type"] for fields in TINY.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_transformers_5_writes_the_same_architecture(name: str, tmp_path: Path) -> None:
    """transformers renames fields when it saves (rope_parameters, num_local_experts) and adds every default it knows."""
    saved, ours = tmp_path / "saved", tmp_path / "ours"
    ours.mkdir()
    hf_config(TINY[name]).save_pretrained(saved)
    fields = json.loads((saved / "config.json").read_text())
    assert "rope_parameters" in fields and "rope_scaling" not in fields and "rope_theta" not in fields
    assert ("num_experts" in fields) == (name == "olmoe")
    expected = read(name, ours)
    assert replace(read_architecture(saved), family=expected.family) == expected  # Kimi-K2 is saved as deepseek_v3


def test_file_and_folder_are_the_same(tmp_path: Path) -> None:
    path = write_tiny_config("qwen3", tmp_path)
    assert read_architecture(path) == read_architecture(tmp_path)


# -- what published models say -----------------------------------------------------------------------------------------


def test_qwen3_moe_235b(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
    routing = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True}
    model = read("qwen3_moe", tmp_path, **sizes, **routing, rope_theta=1e6, rope_scaling=None, vocab_size=151936)
    assert (model.layers, model.head_dim, model.heads * model.head_dim, model.qk_norm) == (94, 128, 8192, "head")
    assert model.moe_layers == (True,) * 94 and model.rope.base == 1e6 and model.rope.scaling == "none"
    assert model.experts == Experts(128, 8, 1536, "softmax", normalize_top_k=True, softmax_before_top_k=False)


def test_deepseek_v3(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "first_k_dense_replace": 3}
    latent = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    routing = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 2048}
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    model = read("deepseek_v3", tmp_path, **sizes, **latent, **routing, **quantised, n_shared_experts=1)
    assert model.latent_attention == LatentAttention(1536, 512, 128, 64, 128) and model.head_dim == 192
    assert model.moe_layers == (False,) * 3 + (True,) * 58
    assert model.rope.interleaved and (model.rope.mscale, model.rope.mscale_all_dim) == (1.0, 1.0)
    experts = Experts(256, 8, 2048, "sigmoid", True, False, 2.5, True, 8, 4, "top2_sum", shared_hidden=2048)
    assert model.experts == experts


def test_deepseek_v2_scores_groups_by_their_best_expert(tmp_path: Path) -> None:
    experts = read("deepseek_v2", tmp_path, n_routed_experts=160, n_group=8, topk_group=3, num_experts_per_tok=6).experts
    assert experts is not None
    assert (experts.groups, experts.top_k_groups, experts.group_score, experts.scaling_factor) == (8, 3, "max", 16.0)
    assert experts.softmax_before_top_k and not experts.normalize_top_k and not experts.expert_bias
    greedy = read("deepseek_v2_lite", tmp_path, n_group=8, topk_group=3).experts
    assert greedy is not None and greedy.groups is None


@pytest.mark.parametrize("name", ["moonlight", "kimi_k2"])
def test_one_group_is_no_limit(name: str, tmp_path: Path) -> None:
    experts = read(name, tmp_path).experts
    assert experts is not None and experts.groups is None and experts.expert_bias


def test_glm_rotates_half_of_each_head(tmp_path: Path) -> None:
    assert read("glm4_moe", tmp_path).rope.fraction == 0.5
    assert read("glm4_moe", tmp_path, partial_rotary_factor=None).rope.fraction == 0.5
    new = {"rope_theta": 1000.0, "rope_type": "default", "partial_rotary_factor": 0.25}
    assert read("glm4_moe", tmp_path, partial_rotary_factor=None, rope_theta=None, rope_parameters=new).rope.fraction == 0.25


def test_glm_switches(tmp_path: Path) -> None:
    model = read("glm4_moe", tmp_path)
    assert model.qkv_bias and model.qk_norm == "head"
    model = read("glm4_moe", tmp_path, attention_bias=False, use_qk_norm=False)
    assert not model.qkv_bias and model.qk_norm == "none"


def test_which_qwen3_layers_hold_experts(tmp_path: Path) -> None:
    assert read("qwen3_moe_mixed", tmp_path).moe_layers == (False, True, False, False)
    assert read("qwen3_moe", tmp_path, mlp_only_layers=[0]).moe_layers == (False, True, True, True)


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [0, 1, 2, 3]}, {"num_experts": 0}])
def test_a_moe_family_without_experts_is_dense(changes: dict[str, Any], tmp_path: Path) -> None:
    model = read("qwen3_moe", tmp_path, **changes)
    assert model.experts is None and not model.is_moe and len(model.moe_layers) == model.layers


def test_defaults_of_absent_fields(tmp_path: Path) -> None:
    assert read("mixtral", tmp_path, rope_theta=None).rope.base == 1e6
    assert read("llama", tmp_path, rope_theta=None, rope_scaling=None).rope.base == 10000.0
    assert read("llama", tmp_path, num_key_value_heads=None).kv_heads == 4
    assert read("qwen2", tmp_path, tie_word_embeddings=None).tied_embeddings is False
    assert read("llama", tmp_path, head_dim=None).head_dim == 16
    assert read("qwen3", tmp_path, architectures=None).family == "qwen3"


def test_yarn_without_an_original_length_stretches_the_longest(tmp_path: Path) -> None:
    rope = read("qwen3", tmp_path, rope_scaling={"type": "yarn", "factor": 4.0}).rope
    assert (rope.scaling, rope.original_max_positions, rope.attention_factor) == ("yarn", 256, None)


def test_a_window_that_never_closes_is_none(tmp_path: Path) -> None:
    assert read("mixtral", tmp_path, sliding_window=256).family == "mixtral"
    assert read("qwen2", tmp_path, use_sliding_window=False, sliding_window=16).family == "qwen2"


# -- what is refused ---------------------------------------------------------------------------------------------------

LLAMA3 = TINY["llama"]["rope_scaling"]
YARN = {"type": "yarn", "factor": 2.0}

UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"model_type": "gpt_oss"}, 'model_type="gpt_oss": not a supported family; supported: deepseek_v2'),
    ("qwen3", {"model_type": ["qwen3"]}, "model_type"),
    ("qwen3", {"model_type": None}, "model_type"),
    ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "supported: Qwen3ForCausalLM"),
    ("qwen3", {"architectures": "Qwen3ForCausalLM"}, "architectures"),
    ("qwen2", {"hidden_act": "gelu"}, 'hidden_act="gelu": not supported; supported: silu'),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true: not supported; supported: false"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    ("mixtral", {"sliding_window": 128}, "sliding_window=128"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: not supported; supported: 0"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: not supported; supported: null"),
    ("olmoe", {"head_dim": 32}, "head_dim=32"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1: not supported; supported: 0"),
    ("llama", {"mlp_bias": True}, "mlp_bias=true"),
    ("llama", {"attention_bias": True}, "attention_bias=true"),
    ("qwen3", {"attention_bias": True}, "attention_bias=true"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias=true"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=false: not supported; supported: true"),
    ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func="softmax": not supported; supported: sigmoid'),
    ("deepseek_v3", {"topk_method": "greedy"}, "supported: noaux_tc"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=false"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "supported: greedy or group_limited_greedy"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=true"),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
    ("glm4_moe", {"rope_scaling": YARN}, "rotated in part"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: not supported for this family; supported: 1"),
    ("qwen3", {"rope_scaling": {"type": "dynamic"}}, 'rope_scaling.type="dynamic": not supported; supported: default'),
    ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ("qwen3", {"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate=false"),
    ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "supported: default, yarn"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "attention_factor": 1.1}}, "rope_scaling.attention_factor=1.1"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "rope_scaling.mscale_all_dim=1.0"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "mscale": 0.7}}, "rope_scaling.mscale=0.7"),
    ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "rope_scaling.low_freq_factor=2.0"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 8.0}}, "rope_scaling.high_freq_factor=8.0"),
    (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings=4096: not supported for rope type llama3; supported: 8192",
    ),
]

NONSENSE: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"num_hidden_layers": 0}, "num_hidden_layers=0: expected an integer of at least 1"),
    ("qwen3", {"hidden_size": "64"}, 'hidden_size="64": expected an integer of at least 1'),
    ("qwen3", {"hidden_size": 64.0}, "hidden_size=64.0"),
    ("qwen3", {"num_attention_heads": True}, "num_attention_heads=true"),
    ("qwen3", {"num_attention_heads": 3}, "num_key_value_heads=2: must divide num_attention_heads=3"),
    ("llama", {"num_attention_heads": 6}, "num_attention_heads=6: must divide hidden_size=64 when head_dim is not given"),
    ("qwen3", {"head_dim": 15}, "head_dim=15: rotary embeddings need an even head size"),
    ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps=0: expected a number above 0"),
    ("qwen3", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ("qwen3", {"tie_word_embeddings": "no"}, 'tie_word_embeddings="no": expected true or false'),
    ("qwen3", {"rope_theta": -1.0}, "rope_theta=-1.0"),
    ("qwen3", {"rope_scaling": "yarn"}, 'rope_scaling="yarn": expected an object'),
    ("qwen3", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor=0.5"),
    ("llama", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters={"),
    ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
    ("glm4_moe", {"partial_rotary_factor": 0.1}, "an even number of each head's 32 dimensions must be rotated"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok=9: there are only 8 experts"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ("qwen3_moe", {"num_local_experts": 16}, "num_local_experts=16: contradicts num_experts=8"),
    ("qwen3_moe", {"mlp_only_layers": [4]}, "mlp_only_layers=[4]: expected a list of layer numbers from 0 to 3"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "as many key-value heads as heads: expected 4"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7"),
    ("deepseek_v3", {"n_group": 3}, "n_group=3: must divide the 16 experts"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group=5: 4 experts cannot be chosen from 5 of 4 groups of 4"),
    ("deepseek_v3", {"n_group": 16}, "topk_group=2: 4 experts cannot be chosen from 2 of 16 groups of 1"),
    ("deepseek_v3", {"n_group": 16, "topk_group": 4}, "n_group=16: a group is scored by its two best experts"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1"),
]


@pytest.mark.parametrize(("name", "changes", "message"), UNSUPPORTED + NONSENSE, ids=lambda value: str(value)[:60])
def test_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    said = refusal(name, tmp_path, **changes)
    assert message in said and str(tmp_path / "config.json") in said


MANDATORY = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"]
MANDATORY_OF = {
    "qwen2": ["num_key_value_heads", "max_position_embeddings"],
    "qwen3_moe": ["num_experts", "num_experts_per_tok", "moe_intermediate_size"],
    "deepseek_v2": ["topk_group", "n_group", "q_lora_rank", "kv_lora_rank", "v_head_dim", "n_shared_experts"],
    "deepseek_v3": ["first_k_dense_replace", "routed_scaling_factor", "n_routed_experts", "n_group", "qk_nope_head_dim"],
    "glm4_moe": ["n_group", "n_shared_experts", "first_k_dense_replace", "num_key_value_heads"],
}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in TINY for field in MANDATORY]
    + [(name, field) for name, fields in MANDATORY_OF.items() for field in fields],
)
def test_absent_mandatory_field(name: str, field: str, tmp_path: Path) -> None:
    """Fields whose default differs between families and versions are not guessed."""
    path = write_tiny_config(name, tmp_path)
    fields = json.loads(path.read_text())
    del fields[field]
    path.write_text(json.dumps(fields))
    with pytest.raises(SettingsError, match=f"{field} is missing: the model cannot be described without it"):
        read_architecture(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "qwen3",', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "holds a JSON list where an object is expected"),
        (b"{}", "model_type is missing"),
    ],
)
def test_broken_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read_architecture(tmp_path)


def test_absent_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "config.json"):
        with pytest.raises(SettingsError, match=r"does not exist; give a Hugging Face config\.json or the folder"):
            read_architecture(path)

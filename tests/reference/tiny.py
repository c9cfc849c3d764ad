"""Tiny models of every family: config.json contents as the families' published checkpoints write them.

Small enough to build in a moment, and decisive: weights of standard deviation 0.2 make routing and logits sharp, head sizes,
widths and the vocabulary are not multiples of one another, and every option that a family has is on in one of its variants.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BASE: Mapping[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-3,  # large enough to tell an epsilon that is ignored
    "rope_theta": 1000.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    # transformers fixes the epsilon of the latent norms to 1e-6; Megatron-core and SGLang use this one.
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}

_YARN: Mapping[str, Any] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}

_DEEPSEEK_V2: Mapping[str, Any] = {
    **_LATENT,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}

_DEEPSEEK_V3: Mapping[str, Any] = {
    **_LATENT,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}

_QWEN3_MOE: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "sliding_window": 128,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "qwen3_yarn": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "attention_bias": False,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "attention_factor": 1.3,
        },
    },
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_moe_mixed": {
        **_QWEN3_MOE,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 16384,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama_linear": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "num_key_value_heads": None,
    },
    "mixtral": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "olmoe": {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
    "deepseek_v2_lite": {
        **_DEEPSEEK_V2,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v2": {
        **_DEEPSEEK_V2,
        "q_lora_rank": 40,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {
        **_DEEPSEEK_V3,
        "q_lora_rank": 40,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonlight": {**_DEEPSEEK_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "kimi_k2": {
        **_DEEPSEEK_V3,
        "model_type": "kimi_k2",
        "q_lora_rank": 40,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": {**_YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
}

TINY: Mapping[str, Mapping[str, Any]] = {name: {**_BASE, **variant} for name, variant in _VARIANTS.items()}


def write_tiny_config(name: str, folder: Path, **changes: Any) -> Path:
    """Write a tiny model's config.json into a folder, with changes to it if wanted, and return its path."""
    path = folder / "config.json"
    path.write_text(json.dumps({**TINY[name], **changes}), encoding="utf-8")
    return path

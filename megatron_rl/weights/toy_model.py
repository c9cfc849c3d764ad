"""A tiny model of random weights as a Hugging Face checkpoint: config.json, generation_config.json and safetensors.

Everything that runs with a published checkpoint runs with this one, without a download.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.weights.hf_files import SINGLE
from megatron_rl.weights.hf_output import plan_files
from megatron_rl.weights.map import WeightMap

type ToyFamily = Literal["qwen3_moe", "qwen3"]

HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 4, 2, 32  # sizes that SGLang's attention takes on a CPU as on a GPU
HIDDEN_STEP, LARGEST_HIDDEN, MOST_LAYERS = 32, 1024, 32
SPREAD = 0.05  # standard deviation of weights: wider than is usual, which a narrow model learns faster from
CLASSES: Mapping[str, str] = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class ToyShape:
    """How large a toy model is. `experts` of a mixture are chosen two at a time."""

    family: ToyFamily = "qwen3_moe"
    layers: int = 2
    hidden: int = 64
    experts: int = 8

    def __post_init__(self) -> None:
        """Raise a SettingsError for sizes that no engine would take, or that are no toy."""
        if self.family not in CLASSES:
            raise SettingsError(f"family = {self.family}: toy models are of {' or '.join(CLASSES)}.")
        if not 1 <= self.layers <= MOST_LAYERS:
            raise SettingsError(f"layers = {self.layers}: a toy model has 1 to {MOST_LAYERS}.")
        if self.hidden % HIDDEN_STEP or not HIDDEN_STEP <= self.hidden <= LARGEST_HIDDEN:
            raise SettingsError(
                f"hidden = {self.hidden}: expected a multiple of {HIDDEN_STEP} from {HIDDEN_STEP} to {LARGEST_HIDDEN}."
            )
        if self.family == "qwen3_moe" and not 2 <= self.experts <= 128:
            raise SettingsError(f"experts = {self.experts}: expected 2 to 128, of which each token chooses two.")


def toy_config(shape: ToyShape, *, vocabulary: int, end: int, pad: int) -> dict[str, Any]:
    """What config.json says of it."""
    config: dict[str, Any] = {
        "architectures": [CLASSES[shape.family]],
        "model_type": shape.family,
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": SPREAD,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }
    if shape.family == "qwen3_moe":
        config |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": shape.hidden,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    return config


def write_toy_weights(folder: Path, config: Mapping[str, Any], seed: int) -> int:
    """Write config and weights into a folder that exists; returns how many numbers there are.

    A tensor follows from the seed and its name alone, so that a model with more layers has those of the smaller one.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    weight_map = WeightMap(read_architecture(folder))
    (file,) = plan_files(weight_map, "float32", frozenset(), shard_size=1 << 62)
    assert file.name == SINGLE
    with file.open(folder / file.name) as writer:
        for output in file.tensors:
            writer.write(output.name, _weights(output.name, output.shape, seed))
    return sum(entry.numbers for entry in weight_map.hf.values())


def _weights(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Norms begin at 1, all else is drawn."""
    if len(shape) == 1:
        return torch.ones(shape)
    own = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little", signed=True)
    return torch.empty(shape).normal_(0.0, SPREAD, generator=torch.Generator().manual_seed(own))

"""Tiny models written as Hugging Face checkpoints, the way transformers publishes them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.reference.tiny import TINY, write_tiny_config


def write_tiny_checkpoint(
    family: str,
    folder: Path,
    *,
    stacked: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "50GB",
    **changes: Any,
) -> dict[str, Tensor]:
    """Random weights of a tiny model, every tensor of them, in a folder. Returns transformers' state dict.

    Published checkpoints have a tensor an expert; `stacked` writes a layer's experts as transformers holds them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY[family], **changes}
    if config["model_type"] == "kimi_k2":  # the authors' code, which is DeepSeek-V3's, is not part of transformers
        config["model_type"] = "deepseek_v3"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(dtype)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and "inv_freq" not in name:  # norms and biases start as constants, which tell nothing
                tensor.add_(torch.randn_like(tensor) * 0.1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if stacked:
        save_file(
            {n: t for n, t in state.items() if not (config["tie_word_embeddings"] and n == "lm_head.weight")},
            folder / "model.safetensors",
        )
    else:
        model.save_pretrained(folder, max_shard_size=shard_size)
    write_tiny_config(family, folder, **changes)
    return state

"""Planted causes: checkpoints that differ from the served one in one thing, and the look that shall name it."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.bench import Draws, bench
from megatron_rl.fidelity.examine import Wanted, examine
from megatron_rl.fidelity.report import Report
from megatron_rl.policy.layout import Launch
from tests.servers import VOCABULARY, TinyServer

PROMPTS, PROMPT, TOKENS = 2, 12, 40
WRONG_EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def settings_of(server: TinyServer, model: Path, **sections: Any) -> Settings:
    defaults: dict[str, Any] = {
        "policy": {"init": model},
        "precision": {"dtype": "float32"},
        "servers": {"urls": [server.server.url]},
    }
    given = {name: {**defaults.get(name, {}), **section} for name, section in sections.items()}
    return Settings.model_validate({**defaults, **given})


def looked(
    settings: Settings,
    *,
    drawn_at: float = 1.0,
    said: float | None = None,
    may_send: bool = False,
    step: int | None = None,
) -> Report:
    """Look at the server of the settings, which samples at a temperature, `said` if it is told to be another."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, VOCABULARY - 1, (PROMPTS, PROMPT), generator=generator).tolist()
    wanted = Wanted(PROMPT + TOKENS, drawn_at if said is None else said, may_send, step=step)
    with bench(settings, Draws(prompts, TOKENS, drawn_at), lambda done, total: None) as hands:
        return examine(settings, Launch(), hands, wanted, lambda what: None)


def weights_of(model: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(model.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def changed(model: Path, folder: Path, weights: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A copy of a checkpoint with other weights, or another config.json."""
    shutil.copytree(model, folder)
    if weights is not None:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    return folder


def older(weights: dict[str, Tensor], size: float = 0.02) -> dict[str, Tensor]:
    """As a few updates before."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1
        else tensor.clone()
        for name, tensor in weights.items()
    }


def near_ties(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Routers whose rows differ by the last bit of float32: rounding decides which experts they choose."""
    generator = torch.Generator().manual_seed(0)
    found = {name: tensor.clone() for name, tensor in weights.items()}
    for name in (name for name in found if name.endswith("mlp.gate.weight")):
        row = found[name][:1]
        ulps = torch.randint(-1, 2, found[name].shape, generator=generator)
        found[name] = row * (1 + ulps * torch.finfo(torch.float32).eps)
    return found


def serve(server: TinyServer, folder: Path) -> None:
    """Have the server load the weights of a folder, under the version it had."""

    async def load() -> None:
        async with server.client() as client:
            await client.pause("abort")
            await client.update_from_disk(str(folder), 0)
            await client.flush_cache()
            await client.resume()

    asyncio.run(load())

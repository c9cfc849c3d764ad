"""The server's side: who it is, and what it samples and says of it."""

import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import UserError
from megatron_rl.config.families import read_architecture
from megatron_rl.fidelity.tokens import Drawn
from megatron_rl.rollout.client import Client, Sampling, new_request
from megatron_rl.rollout.errors import ServerError
from megatron_rl.rollout.replies import RoutingShape, ServerInfo
from megatron_rl.weights.publish.compare import Part

AT_ONCE = 8  # responses under way


@dataclass(frozen=True)
class Facts:
    """What a server says of itself, and what its model's config.json says where that can be read from here."""

    url: str
    model: str
    version: int | None
    dtype: str  # float32, bfloat16, float16 …
    fp8: bool
    quantization: dict[str, Any] | None  # of config.json
    online: str | None  # its argument --quantization
    returns_routing: bool
    tensor_parallel: int
    sglang: str
    config: dict[str, Any] | None  # config.json as it reads it, None where it lies elsewhere

    @property
    def format(self) -> str:
        return "fp8" if self.fp8 else self.dtype


@dataclass(frozen=True)
class Observation:
    """Who the server is, and what it drew."""

    facts: Facts
    temperature: float  # that it drew at
    drawn: list[Drawn]
    parts: list[Part] = field(default_factory=list)  # of the weights, where they were sent to it before


def facts_of(url: str, info: ServerInfo) -> Facts:
    path, config = Path(info.model) / "config.json", None
    with suppress(OSError, ValueError):  # of another machine, or a hub's name
        config = {**json.loads(path.read_text(encoding="utf-8")), **info.overrides}
    quantization = config.get("quantization_config") if config is not None else None
    dtype = info.dtype
    if dtype == "auto":
        told = str((config or {}).get("dtype") or (config or {}).get("torch_dtype") or "bfloat16")
        dtype = "float16" if told == "float32" else told  # sglang 0.5.17, srt/configs/model_config.py
    fp8 = info.quantization == "fp8" or (quantization or {}).get("quant_method") == "fp8"
    names = {"half": "float16", "float": "float32"}
    return Facts(
        url, info.model, info.version, names.get(dtype, dtype), fp8, quantization, info.quantization, info.returns_routing,
        info.tensor_parallel, info.sglang, config,
    )  # fmt: skip


def served_architecture(facts: Facts) -> Architecture | None:
    """The model as the server reads it."""
    if facts.config is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return read_architecture(write_config(facts, Path(folder)))


def write_config(facts: Facts, folder: Path) -> Path:
    assert facts.config is not None
    path = folder / "config.json"
    path.write_text(json.dumps(facts.config), encoding="utf-8")
    return path


async def look(client: Client) -> Facts:
    """Ask the server who it is; one that sleeps, or is not there, is an error."""
    try:
        info = await client.server_info()
    except ServerError as error:
        raise UserError(
            f"{error}. Is an SGLang server running there? Correct --server, or leave it out to start one."
        ) from error
    if info.state in ("asleep", "unsettled", "unfinished"):
        raise UserError(
            f"{client.url} is {info.state}: a run has its memory, or an update of its weights is under way. Wait for the "
            "end of it, or start the server again."
        )
    return facts_of(client.url, info)


async def draw(
    client: Client,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float,
    shape: RoutingShape | None,
) -> list[Drawn]:
    """A response of so many tokens to each prompt, and what the server says of it when it is handed back whole.

    Responses share no cached prefix with earlier ones, whose keys and values may be those of other weights.
    """
    key, gate = f"mismatch {new_request()}", asyncio.Semaphore(AT_ONCE)
    sampling = Sampling(max_new_tokens=tokens, temperature=temperature, ignore_end=True)

    async def one(number: int, prompt: Sequence[int]) -> Drawn:
        async with gate:
            drawn = await client.generate(prompt, sampling, routing=shape, cache_key=f"{key} {number}")
            whole = [*prompt, *drawn.tokens.tolist()]
            given = await client.score(whole)
            return Drawn(np.array(whole, np.int64), len(prompt), drawn.log_probs, given, drawn.routing)

    return list(await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts))))

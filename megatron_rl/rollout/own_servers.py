"""Which servers a run starts by itself: their options from the settings, GPUs dealt, threads shared, logs named."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.config.settings import Settings
from megatron_rl.config.sglang_arguments import value_of
from megatron_rl.rollout.keys import api_key, logs_folder
from megatron_rl.rollout.server import ServerOptions, has_gpu

# Arguments that multiply the GPUs of a server.
SIZES = ("tp_size", "pp_size")
# Of a server on the trainer's GPUs: it can give its memory back, and takes half of what the policy has left free when the
# server starts. The other half is for what comes later: the optimizer's moments, which the first step makes.
COLOCATED_ARGUMENTS: Mapping[str, Any] = {"enable_memory_saver": True, "mem_fraction_static": 0.5}


def own_servers(settings: Settings, key: str | None = None) -> list[ServerOptions]:
    """Options of the servers to start on this machine; none where the settings name others. `key`: their API key, if it is not
    the run's."""
    servers, kind = settings.servers, settings.device.kind
    on_cpu = kind == "cpu" or (kind == "auto" and not has_gpu())
    count = _count(settings, on_cpu)
    if count == 0:
        return []
    hands: Sequence[tuple[int | str, ...] | None] = (
        [None] * count if on_cpu else _dealt(servers, _gpus_each(settings.sglang), count)
    )
    shared = COLOCATED_ARGUMENTS if servers.colocated and not on_cpu else {}
    key = key or api_key(settings)
    return [
        ServerOptions(
            model=_model(settings),
            log=logs_folder(settings) / f"server-{index}.log",
            arguments={**_random_weights(settings), **_routing(settings), **shared, **settings.sglang},
            host=servers.host,
            port=None if servers.port is None else servers.port + index,
            api_key=key,
            device="cpu" if on_cpu else "cuda",
            gpus=hand,
            ranks=tuple(map(_rank_on, hand)) if hand is not None and servers.colocated else (),
            threads=settings.device.threads or max(1, len(os.sched_getaffinity(0)) // count),
            start_seconds=servers.start_seconds,
        )
        for index, hand in enumerate(hands)
    ]


def served_model(settings: Settings) -> Path | None:
    """The folder that own servers load, where there are any and it is a folder. The same on every machine."""
    model = Path(_model(settings))
    return model if settings.servers.starts_any and (model / "config.json").is_file() else None


def _count(settings: Settings, on_cpu: bool) -> int:
    """Servers to start: one, or as many as the GPUs take where these are the trainer's, none of which shall lie idle."""
    servers = settings.servers
    if servers.count is not None or not servers.starts_any:
        return servers.count or 0
    if not servers.colocated or on_cpu:
        return 1
    gpus = servers.gpus if servers.gpus is not None else _visible_gpus()
    return max(1, len(gpus) // _gpus_each(settings.sglang))


def _model(settings: Settings) -> str:
    if settings.servers.model is not None:
        return settings.servers.model
    if settings.policy.init != "random":
        return str(settings.policy.init)
    config = settings.policy.config
    return str(config.parent if config.suffix == ".json" else config)


def _random_weights(settings: Settings) -> dict[str, Any]:
    """A policy that begins at random has no weights to load; the first update brings the servers its own."""
    return {"load_format": "dummy"} if settings.servers.model is None and settings.policy.init == "random" else {}


def _routing(settings: Settings) -> dict[str, Any]:
    return {"enable_return_routed_experts": True} if settings.keeps_routing else {}


def _gpus_each(arguments: dict[str, Any]) -> int:
    """GPUs of one server: the product of its sizes."""
    sizes = [value_of(arguments, size) for size in SIZES]
    return math.prod(size for size in sizes if isinstance(size, int))


def _dealt(servers: ServerSettings, each: int, count: int) -> list[tuple[int | str, ...]]:
    """The GPUs of each server, in order and without sharing."""
    gpus: Sequence[int | str] = servers.gpus if servers.gpus is not None else _visible_gpus()
    if len(set(gpus)) != len(gpus) or len(gpus) < count * each:
        raise SettingsError(
            f"servers.count = {count}: {count} servers take {each} GPUs each (sglang.tp_size x sglang.pp_size), "
            f"and there are {len(set(gpus))} for them. Start fewer servers, or name GPUs in servers.gpus."
        )
    return [tuple(gpus[index * each : (index + 1) * each]) for index in range(count)]


def _rank_on(gpu: int | str) -> int:
    """The rank of this machine that learns on a GPU: ranks take those that are visible in order, from 0 on the main machine."""
    visible = [str(each) for each in _visible_gpus()]
    if str(gpu) not in visible:
        raise SettingsError(
            f"servers.gpus: GPU {gpu} is not among those of the trainer (CUDA_VISIBLE_DEVICES = {','.join(visible)}), which "
            "servers share with servers.placement=colocated. Name GPUs of the trainer, or leave servers.gpus out."
        )
    return visible.index(str(gpu))


def require_ranks(options: Sequence[ServerOptions], local_ranks: int) -> None:
    """Servers that share the trainer's GPUs find a rank on each of theirs."""
    for each in options:
        without = [str(gpu) for gpu, rank in zip(each.gpus or (), each.ranks, strict=False) if rank >= local_ranks]
        if without:
            raise SettingsError(
                f"servers.placement = colocated: a server uses GPU {', '.join(without)}, and none of the {local_ranks} ranks "
                "here does. Start a rank on each GPU, lower servers.count or sglang.tp_size, or name the GPUs of the ranks in "
                "servers.gpus."
            )


def _visible_gpus() -> Sequence[int | str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them. Asked without torch, which takes seconds to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return range(len(list(Path("/dev").glob("nvidia[0-9]*")))) if visible is None else visible.split(",")

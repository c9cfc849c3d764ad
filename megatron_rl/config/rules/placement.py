"""Rules about servers that share the trainer's GPUs. What cannot go on while they sleep cannot be asked for."""

from collections.abc import Iterator

from megatron_rl.config.rules.case import problem
from megatron_rl.config.settings import Settings
from megatron_rl.config.sglang_arguments import value_of


def placement_problems(settings: Settings) -> Iterator[str]:
    """Whatever colocated servers cannot do."""
    if not settings.servers.colocated:
        return
    servers, sampling = settings.servers, settings.sampling
    if sampling.ahead:
        yield _colocated(
            f"sampling.ahead = {sampling.ahead}",
            "servers sleep while the policy learns, so nothing can be sampled meanwhile",
            "Set sampling.ahead=0, or servers.placement=separate with GPUs of the servers' own",
        )
    if sampling.partial:
        yield _colocated(
            "sampling.partial = true",
            "a server that sleeps has lost the responses it was working on",
            "Set sampling.partial=false, or servers.placement=separate with GPUs of the servers' own",
        )
    if servers.update != "abort":
        yield _colocated(
            f"servers.update = {servers.update}",
            "a server that sleeps can keep no responses",
            "Set servers.update=abort, at which none is lost: between steps there are none",
        )
    if servers.router is not None:
        yield _colocated(
            f"servers.router = {servers.router}",
            "a router asks servers whether they are well, and takes sleeping ones for dead",
            "Remove servers.router: without one the pool deals requests to the servers itself",
        )
    if value_of(settings.sglang, "enable_memory_saver") is False:
        yield _colocated(
            "sglang.enable_memory_saver = false",
            "servers can then not give their memory back",
            "Remove it: own servers on GPUs are started with it",
        )
    stages = value_of(settings.sglang, "pp_size")
    if stages not in (None, 1):
        yield _colocated(
            f"sglang.pp_size = {stages}",
            "weights reach servers on the trainer's GPUs through shared memory, which SGLang takes by tensor-parallel rank",
            "Set sglang.pp_size=1, and sglang.tp_size to as many GPUs",
        )


def _colocated(name: str, reason: str, fix: str) -> str:
    return problem(f"{name} with servers.placement = colocated", reason, fix)

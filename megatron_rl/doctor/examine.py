"""The examination: every check in its turn, each for itself. One that fails is a finding, and the rest go on."""

import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from megatron_rl.config.errors import SettingsError
from megatron_rl.doctor.clock import check_clock
from megatron_rl.doctor.devices import check_gpus
from megatron_rl.doctor.finding import Finding, error
from megatron_rl.doctor.folder import check_folder
from megatron_rl.doctor.libraries import check_libraries
from megatron_rl.doctor.limits import check_limits
from megatron_rl.doctor.locks import check_locks
from megatron_rl.doctor.network import check_network
from megatron_rl.doctor.ports import check_ports
from megatron_rl.doctor.ranks import check_ranks, meet
from megatron_rl.doctor.recipe import check_settings
from megatron_rl.doctor.sandbox import check_sandbox
from megatron_rl.doctor.servers import check_servers
from megatron_rl.doctor.step import check_step
from megatron_rl.doctor.versions import check_versions
from megatron_rl.doctor.visit import Visit


@dataclass(frozen=True)
class Check:
    """A kind of check. Under a launcher one rank of the run makes it, or one of each machine."""

    look: Callable[[Visit], Iterable[Finding]]
    text: str
    by: Literal["run", "machine"]


CHECKS: Mapping[str, Check] = {
    "settings": Check(check_settings, "the settings can be read, and fit model and ranks", "run"),
    "versions": Check(check_versions, "installed versions against the pins", "machine"),
    "libraries": Check(
        check_libraries, "torch, CUDA, NCCL, Transformer Engine, SGLang, flash-attn, apex: load, and fit", "machine"
    ),
    "gpus": Check(check_gpus, "GPUs: how many, which, driver, topology, who else uses them", "machine"),
    "network": Check(check_network, "names, interfaces, InfiniBand", "machine"),
    "ports": Check(check_ports, "ports of servers and of the rendezvous", "machine"),
    "limits": Check(check_limits, "open files, shared memory, memory", "machine"),
    "folder": Check(check_folder, "run.directory: can be written to, room, speed", "machine"),
    "locks": Check(check_locks, "run.directory: locks between processes, renames", "machine"),
    "clock": Check(check_clock, "the file system's clock and this machine's", "machine"),
    "sandbox": Check(check_sandbox, "whether a model's programs can be held", "machine"),
    "servers": Check(check_servers, "servers that are named: there, fit, and able to generate", "run"),
    "step": Check(check_step, "a toy policy takes a real step", "machine"),
    "ranks": Check(check_ranks, "collectives over the layout's groups, shared folder, clocks of all machines", "run"),
}


@dataclass(frozen=True)
class Examined:
    """All findings, and the seconds that each check took on this rank."""

    findings: tuple[Finding, ...]
    seconds: Mapping[str, float]
    met: bool = True  # whether the ranks could tell each other; without a launcher there is nobody to tell


def chosen(only: Collection[str], step: bool) -> list[str]:
    """Names of the checks to make, in their order."""
    for name in only:
        if name not in CHECKS:
            near = get_close_matches(name, CHECKS, 1)
            advice = f"Did you mean {near[0]}?" if near else f"There are {', '.join(CHECKS)}."
            raise SettingsError(f"--only {name}: there is no such check. {advice}")
    return [name for name in CHECKS if (not only or name in only) and (step or name != "step")]


def examine(visit: Visit, names: Collection[str], tell: Callable[[str], None] = lambda name: None) -> Examined:
    """Make these checks. Every launched rank calls it with the same names; the main one has everybody's findings."""
    findings: list[Finding] = []
    seconds: dict[str, float] = {}
    for name in names:
        if not _is_ours(CHECKS[name], visit) or (name == "ranks" and visit.launched):
            continue
        tell(name)
        started = time.monotonic()
        findings += made(name, CHECKS[name], visit)
        seconds[name] = time.monotonic() - started
    if not visit.launched or "ranks" not in names:
        return Examined(tuple(findings), seconds)
    tell("ranks")
    started = time.monotonic()
    everybody, met = meet(visit, findings)
    seconds["ranks"] = time.monotonic() - started
    return Examined(tuple(everybody), seconds, met)


def _is_ours(check: Check, visit: Visit) -> bool:
    place = visit.place
    return place.rank == 0 if check.by == "run" else place.local_rank == 0


def made(name: str, check: Check, visit: Visit) -> list[Finding]:
    """What a check finds, and if it breaks off, that."""
    host, findings = socket.gethostname(), list[Finding]()
    try:
        for finding in check.look(visit):
            findings.append(finding)  # one by one: those before a failure stand
    except Exception as fault:
        findings.append(
            error(
                f"the check itself has failed: {type(fault).__name__}: {fault}",
                check.look.__module__,
                "This is a fault of the doctor: report it, with what it says here. What the other checks say stands.",
            )
        )
    return [replace(finding, check=name, host=host, rank=visit.place.rank) for finding in findings]

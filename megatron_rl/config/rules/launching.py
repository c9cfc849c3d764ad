"""Rules about starting a run on a cluster. `megatron-rl launch` asks them; who starts a run otherwise has no use for them."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_rl.config.rules.case import problem
from megatron_rl.config.settings import Settings
from megatron_rl.config.sglang_arguments import value_of

type Way = Literal["slurm", "torchrun", "kubernetes"]
type Part = Literal["all", "train", "servers"]

WORD = re.compile(r"[\w.,:=@+/()\[\]-]+")  # what names of partitions, accounts and the like consist of
NAME = re.compile(r"[A-Za-z_]\w*")
SECRETS = re.compile(r"(^|_)(\w*KEYS?|TOKENS?|SECRETS?|PASS\w*|AUTH|CREDENTIALS?)(_|$)", re.IGNORECASE)  # no TOKENIZERS_…
# Options of sbatch that have a setting of their own, or that the way a job is ended and started again rests on.
OWN = {
    "nodes": "cluster.nodes", "ntasks-per-node": "cluster.gpus_per_node", "job-name": "launch.name", "gres": "launch.gres",
    "partition": "launch.partition", "account": "launch.account", "qos": "launch.qos", "time": "launch.time",
    "output": "launch.logs", "requeue": "launch.requeue", "no-requeue": "launch.requeue", "signal": "launch.signal_seconds",
    "cpus-per-task": "launch.cpus_per_rank", "exclusive": "launch.exclusive", "array": "--sweep", "ntasks": "cluster.nodes",
    "open-mode": "launch.logs", "chdir": "the folder in which you launch", "mem": "launch.exclusive=false",
}  # fmt: skip


def machines(settings: Settings) -> tuple[int, int] | None:
    """Machines that train and ranks on each; None where the settings do not say, or ranks do not fill machines."""
    each, world = settings.cluster.gpus_per_node, settings.world_size
    if settings.cluster.nodes is not None:
        return settings.cluster.nodes, each
    if world is None or (world > each and world % each):
        return None
    return max(1, world // each), min(world, each)


def servers_of_a_machine(settings: Settings) -> int:
    """As many as servers.count says, or as its GPUs hold. A count of 0 is of a run that starts none by itself."""
    if settings.servers.count:
        return settings.servers.count
    return max(1, settings.cluster.gpus_per_node // _gpus_of_a_server(settings))


def gres(settings: Settings) -> str | None:
    """What each node must have: as the settings say, or all its GPUs. Steps of a job that asked for none see none, also on
    nodes that it has for itself."""
    asked = any(option.startswith("--gpus") for option in settings.launch.sbatch)
    if settings.launch.gres is None and settings.cluster.gpu not in (None, "cpu") and not asked:
        return f"gpu:{settings.cluster.gpus_per_node}"
    return None if settings.launch.gres == "none" else settings.launch.gres


def signal_seconds(settings: Settings) -> int:
    return settings.launch.signal_seconds or math.ceil(settings.checkpoint.grace_seconds) + 60


def launch_problems(settings: Settings, way: Way, part: Part) -> Iterator[str]:
    """Whatever is in the way of starting this on a cluster; one line each."""
    yield from _machines_are_known(settings)
    yield from _servers_fit(settings, way, part)
    yield from _colocated_servers_have_their_place(settings, way, part)
    yield from _parts_find_each_other(settings, way, part)
    yield from _there_is_time_to_save(settings)
    yield from _containers_are_whole(settings, way)
    yield from _texts_are_harmless(settings)
    yield from _paths_are_harmless(settings, way)


def _machines_are_known(settings: Settings) -> Iterator[str]:
    each, world = settings.cluster.gpus_per_node, settings.world_size
    if world is None:
        yield problem(
            "cluster.nodes is not set, nor is layout.world_size",
            "it is not known how many machines to ask for",
            "Set cluster.nodes, and cluster.gpus_per_node where it is not 8",
        )
    elif machines(settings) is None:
        yield problem(
            f"layout.world_size = {world} with cluster.gpus_per_node = {each}",
            "ranks fill whole machines, and this is no multiple",
            f"Set layout.world_size to {world // each * each} or {(world // each + 1) * each}, or cluster.gpus_per_node to "
            "what the machines have",
        )


def _servers_fit(settings: Settings, way: Way, part: Part) -> Iterator[str]:
    cluster, servers = settings.cluster, settings.servers
    starts = cluster.server_nodes > 0 or servers.colocated
    size, count = _gpus_of_a_server(settings), servers.count
    if servers.colocated and count == 0:
        yield problem(
            "servers.count = 0 with servers.placement = colocated",
            "no server would be started on the GPUs of the ranks",
            "Remove servers.count, or set it to the servers of one machine",
        )
    elif starts and size > cluster.gpus_per_node:
        yield problem(
            f"sglang.tp_size x sglang.pp_size = {size} with cluster.gpus_per_node = {cluster.gpus_per_node}",
            "a server lives on one machine",
            "Make them smaller, serve an FP8 checkpoint (servers.model), which needs half the GPUs, or start such servers with "
            "SGLang itself: cluster.server_nodes=0, and their URLs in servers.urls_file",
        )
    elif starts and size > 1 and (count or 1) * size > cluster.gpus_per_node:
        yield problem(
            f"servers.count = {count} with sglang.tp_size x sglang.pp_size = {size}",
            f"a machine has {cluster.gpus_per_node} GPUs",
            f"Set servers.count to at most {cluster.gpus_per_node // size}: it counts the servers of one machine",
        )
    known = servers.urls or servers.urls_file is not None or settings.bank.replay is not None
    has_gpus = settings.cluster.gpu is not None or settings.launch.gres is not None or way == "kubernetes"
    if not starts and not known and servers.gpus is None and has_gpus:
        yield problem(
            "cluster.server_nodes = 0 with servers.placement = separate",
            "servers would be started on GPUs that the ranks use",
            "Set cluster.server_nodes, servers.placement=colocated, or servers.urls_file",
        )


def _colocated_servers_have_their_place(settings: Settings, way: Way, part: Part) -> Iterator[str]:
    if not settings.servers.colocated:
        return
    cluster = settings.cluster
    if cluster.server_nodes:
        yield problem(
            f"cluster.server_nodes = {cluster.server_nodes} with servers.placement = colocated",
            "colocated servers use the GPUs of the ranks",
            "Set cluster.server_nodes=0, or servers.placement=separate",
        )
    if part != "all":
        yield problem(
            f"--part {part} with servers.placement = colocated",
            "these servers and ranks share GPUs, so they share a job",
            "Remove --part",
        )
    several = (machines(settings) or (1, 1))[0] > 1
    if several and way != "slurm":
        yield problem(
            f"servers.placement = colocated on several machines with --{way}",
            "a run starts servers on its first machine alone; only the script of --slurm starts them on all",
            "Use --slurm, or give servers machines of their own (cluster.server_nodes)",
        )
    if several and settings.publish.folder is None:
        yield problem(
            "servers.placement = colocated on several machines without publish.folder",
            "servers on the ranks' GPUs get their weights through files, on machines that share no memory",
            "Set publish.folder to a folder that all machines see",
        )


def _parts_find_each_other(settings: Settings, way: Way, part: Part) -> Iterator[str]:
    servers, cluster = settings.servers, settings.cluster
    apart = part != "all" or (way == "torchrun" and cluster.server_nodes > 0)
    if part == "servers" and cluster.server_nodes == 0:
        yield problem(
            "cluster.server_nodes = 0 with --part servers", "there is no machine for servers", "Set cluster.server_nodes"
        )
    if apart and servers.urls_file is None and not (part == "train" and servers.urls):
        yield problem(
            "servers.urls_file is not set",
            "servers and ranks are started apart, and would not find each other",
            "Set servers.urls_file to a file that all machines see, the same for both",
        )


def _there_is_time_to_save(settings: Settings) -> Iterator[str]:
    seconds, grace = settings.launch.signal_seconds, settings.checkpoint.grace_seconds
    if seconds is not None and seconds < grace:
        yield problem(
            f"launch.signal_seconds = {seconds} with checkpoint.grace_seconds = {grace:g}",
            "the job would be ended while it may still be saving",
            f"Set launch.signal_seconds to {math.ceil(grace) + 60}, or make checkpoint.grace_seconds smaller",
        )
    limit = None if settings.launch.time is None else _seconds(settings.launch.time)
    if limit is not None and limit <= signal_seconds(settings):
        yield problem(
            f"launch.time = {settings.launch.time}, {limit:,} s, with {signal_seconds(settings)} s before its end for saving",
            "the job would be told to stop as soon as it begins",
            "Make launch.time longer, or launch.signal_seconds (checkpoint.grace_seconds) smaller",
        )


def _seconds(time: str) -> int | None:
    """Of a time limit as SLURM reads it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None where it has no end, or is none."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *others = (None if part is None else int(part) for part in found.groups())
    parts = [part for part in others if part is not None]
    units = (3600, 60, 1) if days is not None or len(parts) == 3 else (60, 1)
    return (days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _containers_are_whole(settings: Settings, way: Way) -> Iterator[str]:
    launch = settings.launch
    if launch.mounts and launch.container is None:
        yield problem(
            "launch.mounts without launch.container",
            "nothing runs in a container",
            "Set launch.container, or remove launch.mounts",
        )
    for index, mount in enumerate(launch.mounts):
        if not mount.startswith("/") or ":/" not in mount or "," in mount:
            yield problem(f"launch.mounts[{index}] = {mount}", "this is no mount", "Write it as /on/the/host:/in/the/container")
    if way != "kubernetes":
        return
    needed = {
        "container": "the image of the pods",
        "claim": "the volume claim with the run's folder",
        **({"key_secret": "the secret with the servers' API key"} if settings.cluster.server_nodes else {}),
    }
    for name, what in needed.items():
        if getattr(launch, name) is None:
            yield problem(f"launch.{name} is not set", f"pods need {what}", f"Set launch.{name}")
    paths = {"run.directory": settings.run.directory, "policy.config": settings.policy.config}
    for name, path in paths.items():
        if not path.absolute().is_relative_to(launch.claim_path):
            yield problem(
                f"{name} = {path} with launch.claim_path = {launch.claim_path}",
                "pods see the volume claim and nothing else",
                f"Put it below {launch.claim_path}",
            )


def _texts_are_harmless(settings: Settings) -> Iterator[str]:
    """Nothing that could end a line of the script, or be taken for another option."""
    launch = settings.launch
    for name in ("name", "partition", "account", "qos", "time", "gres", "claim", "key_secret"):
        text = getattr(launch, name)
        if text is not None and not WORD.fullmatch(text):
            yield problem(f"launch.{name} = {text!r}", "this is no name", "Use letters, digits and . , : = @ + / ( ) [ ] -")
    for index, module in enumerate(launch.modules):
        if not WORD.fullmatch(module) or module.startswith("-"):
            yield problem(f"launch.modules[{index}] = {module!r}", "this is no module", "Write its name, such as cuda/13.0")
    for index, option in enumerate(launch.sbatch):
        name = option.removeprefix("--").partition("=")[0]
        if not option.startswith("--") or not option.isprintable() or any(mark in option for mark in " #'\"\\"):
            yield problem(
                f"launch.sbatch[{index}] = {option!r}", "this is no option in one word", "Write it as --constraint=h100"
            )
        elif name in OWN:
            yield problem(f"launch.sbatch[{index}] = {option}", f"this is what {OWN[name]} says", f"Set {OWN[name]} instead")
    for index, variable in enumerate(launch.environment):
        name, equals, value = variable.partition("=")
        if not equals or not NAME.fullmatch(name) or not value.isprintable():
            yield problem(f"launch.environment[{index}]", "this is no variable", "Write it as NAME=value, in one line")
        elif SECRETS.search(name):
            yield problem(
                f"launch.environment[{index}] = {name}=…",
                "settings are saved with the run and shown to whoever looks, and this sounds like a secret",
                f"Export {name} in the shell that submits: SLURM passes its variables on; or keep it in a file",
            )


def _paths_are_harmless(settings: Settings, way: Way) -> Iterator[str]:
    launch = settings.launch
    paths: dict[str, Path | str | None] = {
        "launch.logs": launch.logs or settings.run.directory,
        "launch.venv": launch.venv,
        "launch.checkout": launch.checkout,
        "launch.container": launch.container,
        "the folder in which you launch": Path.cwd() if way == "slurm" else None,
    }
    for name, path in paths.items():
        if path is not None and (not str(path).isprintable() or any(mark in str(path) for mark in '"\\%')):
            yield problem(
                f"{name} = {str(path)!r}", 'SLURM reads ", \\ and % in paths as something else', "Choose a path without them"
            )


def _gpus_of_a_server(settings: Settings) -> int:
    sizes = [value_of(settings.sglang, name) for name in ("tp_size", "pp_size")]
    return math.prod(size for size in sizes if isinstance(size, int))

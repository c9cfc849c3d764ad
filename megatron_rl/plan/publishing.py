"""Seconds that new weights take to reach the servers (docs/publish.md says how they travel)."""

import math

from megatron_rl.config.counting import model_parameters
from megatron_rl.plan.job import Job
from megatron_rl.plan.serving import Server


def transport(job: Job) -> str:
    """The way that weights go; what `auto` stands for."""
    asked = job.settings.publish.transport
    if asked != "auto":
        return asked
    if job.machine.cpu:
        return "disk" if job.nodes == 1 else "broadcast"
    return "tensor" if job.settings.servers.colocated else "broadcast"


def publish_seconds(job: Job, server: Server, servers: int) -> float:
    """One publish: the slower of gathering and sending a model's bytes, what servers take to load them, and a fixed part.

    broadcast: each sending machine gathers the whole model and sends it to its share of the servers, one after the other.
    tensor: each machine's ranks gather the whole model for the server on their GPUs, and hand it over in place.
    disk: ranks write their shares side by side, every server reads all.
    """
    machine, nodes = job.machine, job.nodes
    width = 1 if server.weight_bytes < 2 else server.plain_bytes
    size = model_parameters(job.architecture).total * width
    between = machine.between.gb_s * 1e9 * machine.shares.between
    inside = machine.inside.gb_s * 1e9 * machine.shares.inside
    gathering = size / (between if nodes > 1 else inside)
    loading = size / (machine.load_gb_s * 1e9)
    match transport(job):
        case "disk":
            disk = machine.disk_gb_s * 1e9
            travelling = size / (disk * nodes) + size / disk
        case "tensor":
            travelling = gathering
        case _:
            senders = min(job.settings.publish.senders or nodes, max(1, servers))
            travelling = max(gathering, size * math.ceil(servers / senders) / between)
    return travelling + loading + machine.costs.publish_s

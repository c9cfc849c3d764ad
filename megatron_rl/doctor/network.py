"""Addresses and interfaces that ranks and servers will use."""

import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit

INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
INFINIBAND = Path("/sys/class/infiniband")


def check_network(visit: Visit) -> Iterator[Finding]:
    """What can be told without speaking to anybody."""
    yield from _own_name(visit)
    yield from _master(visit)
    there = {name for _, name in socket.if_nameindex()}
    for variable in INTERFACES:
        asked = visit.environment.get(variable, "")
        names = [name.lstrip("=^") for name in asked.split(",") if name]
        # NCCL takes beginnings of names, =name for exactly this one, and ^name for all but it.
        wrong = [name for name in names if not asked.startswith("^") and not any(each.startswith(name) for each in there)]
        if wrong:
            yield error(
                f"{variable} names {wrong[0]}, and this machine has {', '.join(sorted(there))}",
                variable,
                "Name an interface that is there (ip addr), or unset it.",
            )
    yield from _infiniband()


def _own_name(visit: Visit) -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as fault:
        yield warning(
            f"this machine does not know the address of its own name {name}: {fault}",
            "/etc/hosts",
            "Name it there; servers that listen beyond this machine, and gloo, look it up.",
        )
        return
    machines = visit.place.world_size > visit.place.local_world_size
    if machines and address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in visit.environment:
        yield warning(
            f"{name} is {address}, where no other machine reaches it",
            "/etc/hosts",
            "Give the name its real address there, or set GLOO_SOCKET_IFNAME to the interface that the machines share.",
        )
    else:
        yield well(f"{name} is {address}", "/etc/hosts")


def _master(visit: Visit) -> Iterator[Finding]:
    master = visit.environment.get("MASTER_ADDR")
    if master is None:
        return
    try:
        socket.getaddrinfo(master, None)
    except OSError as fault:
        yield error(
            f"MASTER_ADDR = {master} has no address here: {fault}",
            "MASTER_ADDR",
            "Give a name or address that all machines know.",
        )


def _infiniband() -> Iterator[Finding]:
    """Ports that are down leave NCCL with fewer, or with TCP."""
    ports = sorted(INFINIBAND.glob("*/ports/*/state"))
    down = [port for port in ports if "ACTIVE" not in port.read_text()]
    if down:
        yield warning(
            f"{len(down)} of {len(ports)} InfiniBand ports are not active: {', '.join(port.parts[4] for port in down)}",
            str(INFINIBAND),
            "Have them mended, or leave them out with NCCL_IB_HCA.",
        )
    elif ports:
        yield well(f"{len(ports)} InfiniBand ports are active", str(INFINIBAND))

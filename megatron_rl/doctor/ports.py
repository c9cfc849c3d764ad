"""Ports that the run will listen on: free, and not among those that the system gives away."""

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def check_ports(visit: Visit) -> Iterator[Finding]:
    """Those of own servers, and the rendezvous's where nobody listens there yet."""
    asked = dict(_asked(visit))
    for port, (name, host) in asked.items():
        yield _look_at(port, name, host)
    given = _given_away()
    inside = [port for port in asked if given and given[0] <= port <= given[1]]
    if inside and given:
        yield warning(
            f"port {inside[0]} is one of those that the system gives to any program ({given[0]} to {given[1]})",
            str(EPHEMERAL),
            f"Choose ports below {given[0]}: it may be taken by the time it is wanted.",
        )
    if not asked:
        yield well("no fixed port is asked for: free ones are taken", visit.named)


def _asked(visit: Visit) -> Iterator[tuple[int, tuple[str, str]]]:
    """Port -> who wants it, and where it shall listen."""
    settings = visit.settings
    if settings is not None and settings.servers.port is not None:
        servers = settings.servers
        count = servers.count if servers.count is not None else int(not servers.urls and servers.urls_file is None)
        for number in range(count):
            yield settings.servers.port + number, ("servers.port", servers.host)
    master = visit.environment.get("MASTER_PORT", "")
    if master.isdecimal() and not visit.launched:  # a launcher that has started us listens there
        yield int(master), ("MASTER_PORT", "")


def _look_at(port: int, name: str, host: str) -> Finding:
    if port > 65535:
        return error(f"{name}: there is no port {port}", name, "Choose one between 1024 and 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what was just closed is free
        try:
            probe.bind((host, port))
        except OSError as fault:
            if fault.errno == errno.EADDRINUSE:
                return error(
                    f"port {port} ({name}) is taken", f"{host}:{port}", f"End who listens there (ss -ltnp), or change {name}."
                )
            return error(
                f"port {port} ({name}) cannot be listened on: {fault.strerror}",
                f"{host}:{port}",
                f"Change {name} or servers.host.",
            )
    return well(f"port {port} ({name}) is free", f"{host}:{port}")


def _given_away() -> tuple[int, int] | None:
    if not EPHEMERAL.exists():
        return None
    first, last = EPHEMERAL.read_text().split()
    return int(first), int(last)

"""Starting ranks: a run that nobody launched starts its own on this machine."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PATIENCE = 30.0  # seconds between asking ranks to end and ending them, where they have nothing to save
TOLD = 128 + signal.SIGTERM  # exit code of a rank that was told to stop, and has saved


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Did torchrun (or another launcher that speaks its language) start this process?"""
    return "WORLD_SIZE" in environment


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Is this the rank whose words are printed, where all ranks would say the same?"""
    return environment.get("RANK", "0") == "0"


def start_local_ranks(ranks: int, arguments: Sequence[str], patience: float = PATIENCE) -> int:
    """Run `megatron-rl ARGUMENTS` as so many ranks on this machine; returns the exit code of the first that fails, or 0.

    What torchrun does for one machine, without its words: the ranks share this terminal, and end together. Told to stop, they
    have so many seconds of patience to save.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    command = [sys.executable, "-m", "megatron_rl.cli", *arguments]
    signal.signal(signal.SIGTERM, _leave)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, preexec_fn=_end_with_parent))
        code = _wait(processes)
        if code not in (0, TOLD):  # what the others had to save is lost with the one that failed
            patience = min(patience, PATIENCE)
        return code
    finally:
        _end(processes, patience)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended well, or one has not. Ranks that fail alike (bad settings) all get to say so."""
    while not _failed(processes) and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    rank, code = _failed(processes) or (0, 0)
    if code < 0:
        print(
            f"rank {rank} was killed ({signal.Signals(-code).name}), by somebody or by the system for want of memory. What was "
            "done before its last checkpoint is kept; go on with --resume.",
            file=sys.stderr,
        )
    deadline = time.monotonic() + 2.0
    while code and time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    return code if code >= 0 else 128 - code  # as a shell tells of a signal


def _failed(processes: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """A rank that has not ended well, and its code: first one that was killed, of which the others only died."""
    codes = [(rank, code) for rank, process in enumerate(processes) if (code := process.poll())]
    return min(codes, key=lambda failed: failed[1] >= 0, default=None)


def _end(processes: list[subprocess.Popen[bytes]], patience: float) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Linux ends a rank whose starter was killed before it could."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _leave(number: int, _: FrameType | None) -> None:
    """A terminated starter ends its ranks on the way out."""
    raise SystemExit(128 + number)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

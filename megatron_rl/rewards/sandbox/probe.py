"""What the sandbox can enforce on this machine, found out by trying to break out of it.

A kernel may have a feature and refuse it, and a container may forbid what its kernel allows; so nothing is asked, all is tried.
"""

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_rl.rewards.sandbox.runner import Limits, Outcome, Program, SandboxError, Walls, run

Limit = Literal["cpu", "memory", "processes", "network", "writing", "reading", "signals", "many_processes", "scratch"]

MEANING: dict[Limit, str] = {
    "cpu": "seconds of computing",
    "memory": "bytes of memory, over all its processes",
    "processes": "starts no other process, unless told that it may",
    "network": "reaches no address, this machine's included",
    "writing": "changes no file outside its scratch folder",
    "reading": "reads no file but those of the interpreter and the system's libraries",
    "signals": "reaches no other process",
    "many_processes": "processes > 1: never more of them than that, and none that stays",
    "scratch": "scratch > 0: a folder to write in, of bounded size",
}
ESSENTIAL: tuple[Limit, ...] = ("cpu", "memory", "processes", "network", "writing", "reading", "signals")

BREAK_OUT = """
import os, resource, socket
folder, port, sampler, memory, cpu = {folder!r}, {port}, {sampler}, {memory}, {cpu}

def held(attempt):
    try:
        attempt()
    except (OSError, MemoryError):
        return True
    return False

def fork():
    if os.fork() == 0:
        os._exit(0)

def datagram():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", port))

print("cpu", resource.getrlimit(resource.RLIMIT_CPU) == (cpu, cpu))
print("memory", held(lambda: bytearray(memory)))
print("processes", held(fork))
print("network", held(lambda: socket.create_connection(("127.0.0.1", port), 1)) and held(datagram))
print("writing", held(lambda: open(folder + "/new", "w")) and held(lambda: os.truncate(folder + "/own", 0)))
print("reading", held(lambda: open(folder + "/own").read()))
print("signals", held(lambda: os.kill(sampler, 0)))
"""
MANY = """
import os, time
started = 0
for _ in range({asked}):
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
        started += 1
    except OSError:
        break
print("many_processes", started == {processes} - 1)
"""
FILL = """
def size(name, count):
    try:
        with open(name, "wb", buffering=0) as file:
            return sum(file.write(bytes(1 << 16)) for _ in range(count))
    except OSError:
        return 0

small = size("small", 2)
print("scratch", small == 1 << 17 and sum(size(str(i), 8) for i in range(9)) < {scratch})
"""


@dataclass(frozen=True)
class Standing:
    """The walls that were chosen, and which limits held when a program ran at them."""

    walls: Walls
    held: frozenset[Limit]
    faults: tuple[str, ...]  # of walls that could not be built here

    def missing(self, *, processes: int, scratch: int) -> list[Limit]:
        """The limits that a run with these options needs and that do not hold."""
        needed = [*ESSENTIAL, *(["many_processes"] if processes > 1 else []), *(["scratch"] if scratch else [])]
        return [limit for limit in MEANING if limit in needed and limit not in self.held]


def candidates() -> Iterator[Walls]:
    """From the strongest to the weakest."""
    root = os.geteuid() == 0
    spaces: list[tuple[Literal["root", "user", "none"], bool]] = [("user", False), ("none", False)]
    if root:
        spaces = [("root", True), ("user", False), ("none", True), ("none", False)]
    for seccomp, landlock in ((True, True), (True, False), (False, True), (False, False)):
        for namespaces, other_user in spaces:
            yield Walls(namespaces, other_user, seccomp, landlock)


async def stand() -> Standing:
    """The first walls behind which every limit holds, else those that hold most."""
    best: Standing | None = None
    faults: list[str] = []
    for walls in candidates():
        try:
            held = await attack(walls)
        except SandboxError as error:
            faults.append(f"{walls}: {error}")
            continue
        if best is None or len(held) > len(best.held):
            best = Standing(walls, held, tuple(faults))
        if held == MEANING.keys():
            break
    if best is None:
        raise SandboxError("no program can be run here at all:\n" + "\n".join(faults))
    return best


async def attack(walls: Walls) -> frozenset[Limit]:
    """The limits that hold behind these walls."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as server:
        folder = Path(name)
        folder.chmod(0o777)
        own = folder / "own"
        own.write_text("ours")
        own.chmod(0o666)
        limits = Limits(cpu=5, wall=10)
        words = {"folder": name, "port": server.getsockname()[1], "sampler": os.getpid()}
        text = BREAK_OUT.format(**words, memory=limits.memory, cpu=limits.cpu)
        outcome = await run(Program(text), limits, walls)
        untouched = own.read_text() == "ours" and not (folder / "new").exists()
    lines = _lines(outcome)
    if walls.namespaces != "none":
        several, scratch = Limits(wall=5, processes=3), Limits(wall=5, scratch=1 << 20)
        others = await asyncio.gather(
            run(Program(MANY.format(asked=6, processes=3)), several, walls),
            run(Program(FILL.format(scratch=scratch.scratch)), scratch, walls),
        )
        lines |= {name: verdict for other in others for name, verdict in _lines(other).items()}
    if not untouched:
        lines["writing"] = "False"
    return frozenset(limit for limit in MEANING if lines.get(limit) == "True")


def _lines(outcome: Outcome) -> dict[str, str]:
    if not outcome.well:
        raise SandboxError(f"a trial program ended with {outcome.ended} {outcome.code}: {outcome.stderr[-300:].strip()}")
    return dict(line.split() for line in outcome.stdout.splitlines())

"""The processes of a run that trains on this machine, as one finds them in /proc: to be killed, and to be missed."""

import os
from dataclasses import dataclass
from pathlib import Path


def children(process: int) -> list[int]:
    """Of all its threads."""
    found = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(child) for child in read(thread).split()]
    return sorted(found)


def descendants(process: int) -> list[int]:
    return [each for child in children(process) for each in (child, *descendants(child))]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def command(process: int) -> str:
    return read(Path(f"/proc/{process}/cmdline")).replace(b"\0", b" ").decode(errors="replace")


def busy(process: int) -> bool:
    """Does it compute?"""
    state = read(Path(f"/proc/{process}/stat")).rpartition(b")")[2].split()
    return bool(state) and state[0] == b"R"


@dataclass(frozen=True)
class Processes:
    """Those of a run, as far as they are there."""

    launcher: int
    ranks: tuple[int, ...]
    keeper: int | None
    server: int | None
    parts: tuple[int, ...]  # of the server

    @classmethod
    def of(cls, launcher: int) -> "Processes":
        def rank(process: int) -> int:
            variables = read(Path(f"/proc/{process}/environ")).split(b"\0")
            return next((int(each[5:]) for each in variables if each.startswith(b"RANK=")), -1)

        ranks = tuple(sorted((each for each in children(launcher) if rank(each) >= 0), key=rank))
        keepers = [each for each in (children(ranks[0]) if ranks else []) if "keeper.py" in command(each)]
        keeper = keepers[-1] if keepers else None
        server = next(iter(children(keeper)), None) if keeper else None
        return cls(launcher, ranks, keeper, server, tuple(descendants(server)) if server else ())

    def named(self, victim: str) -> list[int]:
        """The processes of a victim; none as long as it is not there."""
        match victim:
            case "a rank":
                return list(self.ranks[1:])
            case "the main rank":
                return list(self.ranks[:1])
            case "the launcher":
                return [self.launcher]
            case "the server":
                return [self.server] if self.server else []
            case "its scheduler" | "its detokenizer":
                return [part for part in self.parts if f"sglang::{victim.removeprefix('its ')}" in command(part)]
            case "its keeper":
                return [self.keeper] if self.keeper else []
            case "the server's tree":
                return [self.keeper, self.server, *self.parts] if self.keeper and self.server else []
            case _:
                return [self.launcher, *descendants(self.launcher)]


def alive() -> list[int]:
    """All that the runs have started, orphans included; what has ended is let go."""
    left = []
    for process in children(os.getpid()):
        state = read(Path(f"/proc/{process}/stat")).rpartition(b")")[2].split()
        if state[:1] == [b"Z"]:
            try:
                os.waitpid(process, os.WNOHANG)
            except ChildProcessError:  # somebody waited for it
                continue
        else:
            left += [process, *descendants(process)]
    return left

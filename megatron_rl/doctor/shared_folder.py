"""Whether all machines see one folder, and each other's locks in it: the main rank holds one, the others try it."""

import fcntl
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.rules.case import counted
from megatron_rl.doctor.finding import Finding, error, well
from megatron_rl.policy.layout import Layout

PATIENCE = 10.0  # seconds until a file that one machine has made is seen on the others (attribute caches)
SHARE = "Set run.directory to a folder that all machines mount: NFS 4, Lustre with -o flock, or a parallel file system."


def look_at_shared_folder(layout: Layout, folder: Path) -> Iterator[Finding]:
    """What the ranks other than the main one see. Every rank calls it; the main one has the findings."""
    name: str = layout.from_main(f".doctor-{uuid.uuid4().hex}")
    path = folder / name
    held = path.open("w+b") if layout.is_main else None
    if held is not None:
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        layout.barrier()
        seen = layout.main_has((socket.gethostname(), "held" if layout.is_main else _looks(path)))
        layout.barrier()
    finally:
        if held is not None:
            held.close()
            path.unlink()
    yield from _judged(seen, folder)


def _looks(path: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return "missing"
        time.sleep(0.1)
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        return "open"


def _judged(seen: list[tuple[str, str]], folder: Path) -> Iterator[Finding]:
    if not seen:
        return
    blind = sorted({host for host, what in seen if what == "missing"})
    lawless = sorted({host for host, what in seen if what == "open"})
    if blind:
        yield error(f"{', '.join(blind)} does not see what {seen[0][0]} writes", str(folder), SHARE)
    if lawless:
        yield error(f"a lock of {seen[0][0]} does not keep {', '.join(lawless)} out", str(folder), SHARE)
    if not blind and not lawless:
        hosts = len({host for host, _ in seen})
        yield well(
            f"{counted(len(seen), 'rank')} on {counted(hosts, 'machine')} see one folder and its locks",
            str(folder),
            machines=hosts,
        )

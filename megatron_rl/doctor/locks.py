"""Whether the file system of the run keeps its promises between processes: locks exclude, and a rename is all or nothing.

The bank and the run's folder count on both (`rollout/bank/lock.py`, `weights/checkpoint_files.py`).
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.doctor.finding import Finding, error, well
from megatron_rl.doctor.folder import nearest, trial_folder, unwritable
from megatron_rl.doctor.visit import Visit

RENAMES = 200
SIZE = 4096  # bytes of the file that is replaced; all of them alike
SECONDS = 30.0

# Other processes, which import nothing that could be missing.
TRY = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
try:
    getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(11)
"""
WATCH = """
import sys
print("ready", flush=True)
torn = missing = looks = 0
while True:
    try:
        with open(sys.argv[1], "rb") as file:
            text = file.read()
    except FileNotFoundError:
        missing += 1
        continue
    looks += 1
    torn += len(text) != int(sys.argv[2]) or len(set(text)) != 1
    if text[:1] == b"z":
        break
print(looks, torn, missing)
"""
REFUSED = 11


def check_locks(visit: Visit) -> Iterator[Finding]:
    """On this machine; between machines the ranks try it, under a launcher."""
    place = nearest(visit.folder)
    refusal = unwritable(place, "nothing can be tried there")
    if refusal is not None:
        yield refusal
        return
    with trial_folder(visit) as trial:
        for name in ("flock", "lockf"):
            yield _lock(name, trial / name, place)
        yield _renames(trial / "replaced", place)


def _lock(name: str, path: Path, place: Path) -> Finding:
    fix = "Put the run on a file system that has locks (NFS 4, Lustre mounted with -o flock), or set bank.directory to one."
    lock = getattr(fcntl, name)
    with path.open("w+b") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            return error(f"{name} does not work: {fault.strerror}", str(place), fix)
        held = _tries(name, path)
        lock(file, fcntl.LOCK_UN)
        free = _tries(name, path)
    if held != REFUSED:
        return error(f"a lock ({name}) does not keep a second process out", str(place), fix)
    if free != 0:
        return error(f"a lock ({name}) that was given back is still held", str(place), fix)
    return well(f"a lock ({name}) keeps a second process out until it is given back", str(place))


def _tries(name: str, path: Path) -> int:
    command = [sys.executable, "-I", "-S", "-c", TRY, str(path), name]
    return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=SECONDS).returncode


def _renames(path: Path, place: Path) -> Finding:
    """A file is replaced again and again while another process reads it: it finds an old or a new one, whole."""
    fix = "Do not keep runs on this file system: a checkpoint or the bank could be read half-written."
    path.write_bytes(b"a" * SIZE)
    command = [sys.executable, "-I", "-S", "-c", WATCH, str(path), str(SIZE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        try:
            watcher.stdout.readline()
            beside = path.with_name("beside")
            for number in range(RENAMES):
                beside.write_bytes(b"xy"[number % 2 : number % 2 + 1] * SIZE)
                os.replace(beside, path)
            beside.write_bytes(b"z" * SIZE)
            os.replace(beside, path)
            looks, torn, missing = map(int, watcher.communicate(timeout=SECONDS)[0].split())
        finally:
            watcher.kill()
    if torn or missing:
        return error(
            f"of {looks + missing} looks at a file that is being replaced, {torn} found half of it and {missing} none",
            str(place),
            fix,
        )
    return well(f"a rename is all or nothing: {looks:,} looks at {RENAMES} of them", str(place), looks=looks)

"""The run's folder: whether it can be made and written to, has room for checkpoints, and is quick enough for the bank."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rl.config.counting import model_parameters
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit

MIB, GIB = 1 << 20, 1 << 30
STREAM = 64 * MIB  # written and read again
SMALL_FILES = 16  # written, brought to the disk, renamed: what keeping a group costs, and ending a checkpoint
SLOW_STREAM = 100.0  # MB/s: a checkpoint of 30 billion parameters takes an hour
SLOW_FILE = 0.1  # seconds: the bank brings each gathering of groups to the disk
BYTES_A_PARAMETER = 16  # of a checkpoint: weights, float32 masters, two moments


def nearest(folder: Path) -> Path:
    """The folder itself, or what there is of the way to it."""
    folder = folder.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def unwritable(place: Path, so: str) -> Finding | None:
    """That nothing can be tried in a place, and what follows: the finding of checks that need to; `folder` says why."""
    if place.is_dir() and os.access(place, os.W_OK):
        return None
    return error(f"{place} cannot be written to, so {so}", str(place), "See what the check `folder` says.")


@contextmanager
def trial_folder(visit: Visit) -> Iterator[Path]:
    """A folder beside what the run will write, on the same file system; nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=nearest(visit.folder)) as name:
        yield Path(name)


def check_folder(visit: Visit) -> Iterator[Finding]:
    """Written to for real: who asks for permission learns less."""
    place = nearest(visit.folder)
    if not place.is_dir():
        yield error(
            f"run.directory = {visit.folder} cannot be made: {place} is a file",
            str(place),
            "Remove the file, or set run.directory.",
        )
        return
    try:
        with trial_folder(visit) as trial:
            yield from _room(visit, place)
            yield from _speed(trial)
    except OSError as fault:
        yield error(
            f"{place} cannot be written to: {fault.strerror or fault}",
            str(place),
            "Make it writable for this user (permissions, quota, a mount that is read-only, ulimit -f), or set run.directory.",
        )


def _room(visit: Visit, place: Path) -> Iterator[Finding]:
    """For the checkpoints that are kept, and the one being written."""
    free = shutil.disk_usage(place).free
    inodes = os.statvfs(place)
    if inodes.f_files and not inodes.f_favail:
        yield error("no more files can be made there: it has no inodes left", str(place), "Remove files, or set run.directory.")
    architecture, settings = visit.architecture, visit.settings
    one = model_parameters(architecture).total * BYTES_A_PARAMETER if architecture is not None else 0
    kept = settings.checkpoint.keep_last + 1 if settings is not None else 1
    fix = "Free some, set checkpoint.keep_last lower, or set run.directory to a larger file system."
    told = f"{free / GIB:,.1f} GiB are free"
    wanted = {"free": float(free), "checkpoint": float(one)}
    if free < one + GIB:
        yield error(f"{told}, and one checkpoint takes {one / GIB:,.1f} GiB", str(place), fix, **wanted)
    elif free < one * kept + GIB:
        yield warning(f"{told}, and {kept} checkpoints take {one * kept / GIB:,.1f} GiB", str(place), fix, **wanted)
    else:
        yield well(f"{told}; a checkpoint takes {one / GIB:,.1f} GiB" if one else told, str(place), **wanted)


def _speed(trial: Path) -> Iterator[Finding]:
    """One large file, and several small ones, to the disk."""
    block, large = os.urandom(MIB), trial / "large"
    started = time.monotonic()
    with large.open("wb", buffering=0) as file:
        for _ in range(STREAM // MIB):
            if file.write(block) != MIB:
                raise OSError(0, "it took less than it was given: the disk or a quota is full")
        os.fsync(file.fileno())
        written = time.monotonic() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from memory
    started = time.monotonic()
    with large.open("rb", buffering=0) as file:
        while piece := file.read(MIB):
            if piece != block:
                yield error("what was written is read back changed", str(trial.parent), "Do not use this file system.")
                return
    read = time.monotonic() - started
    started = time.monotonic()
    for number in range(SMALL_FILES):
        part = trial / f"{number}.part"
        with part.open("wb") as file:
            file.write(b"group")
            file.flush()
            os.fsync(file.fileno())
        part.rename(trial / str(number))
    small = (time.monotonic() - started) / SMALL_FILES
    rates = {"write": STREAM / 1e6 / max(written, 1e-9), "read": STREAM / 1e6 / max(read, 1e-9), "small": small}
    told = (
        f"{rates['write']:,.0f} MB/s written, {rates['read']:,.0f} MB/s read, {small * 1000:.1f} ms for a small file to be kept"
    )
    if rates["write"] < SLOW_STREAM or small > SLOW_FILE:
        yield warning(
            f"slow: {told}",
            str(trial.parent),
            "Set run.directory to a faster file system, or checkpoint.asynchronous=true.",
            **rates,
        )
    else:
        yield well(told, str(trial.parent), **rates)

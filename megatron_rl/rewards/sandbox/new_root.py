"""A root directory that holds an interpreter, the libraries it needs, a few devices, and nothing else of the machine.

Everything is there at its own path, read-only. The process that calls `enter` must be in a mount namespace of its own.
"""

import os
import platform
import re
from collections.abc import Sequence

from megatron_rl.rewards.sandbox import kernel
from megatron_rl.rewards.sandbox.syscalls import MACHINES, NUMBERS

SCRATCH = "/scratch"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
OLD = "/old"
MOST_FILES = 1000  # in the scratch folder
KEPT_FLAGS = (  # a mount's flags as statvfs has them and as mount takes them: what was locked must stay
    (os.ST_NOSUID, kernel.MS_NOSUID),
    (os.ST_NODEV, kernel.MS_NODEV),
    (os.ST_NOEXEC, kernel.MS_NOEXEC),
    (os.ST_NOATIME, kernel.MS_NOATIME),
    (os.ST_NODIRATIME, kernel.MS_NODIRATIME),
    (os.ST_RELATIME, kernel.MS_RELATIME),
)


def enter(foundation: str, paths: Sequence[str], scratch: int) -> None:
    """Make `paths` the only files that there are. `foundation` is any directory; `scratch` the bytes that may be written."""
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", foundation, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=1000,mode=755")
    os.mkdir(foundation + OLD)
    column = MACHINES[platform.machine()].column if platform.machine() in MACHINES else 1  # others count as arm64 does
    number = NUMBERS["pivot_root"][column]
    assert number is not None
    kernel.pivot_root(number, foundation, foundation + OLD)
    os.chdir("/")
    for path in (*DEVICES, *paths):
        _bring(path)
    os.mkdir(SCRATCH)
    if scratch:
        options = f"size={scratch},nr_inodes={MOST_FILES},mode=1777"
        kernel.mount("tmpfs", SCRATCH, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, options)
    kernel.unmount(OLD)
    os.rmdir(OLD)
    kernel.mount("", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)


def _bring(path: str) -> None:
    """Show what the old root has at a path; links on the way are made anew, so that the path leads to the same file."""
    if os.path.lexists(path):
        return
    parent = os.path.dirname(path)
    if parent != "/":
        _bring_folder(parent)
    if os.path.lexists(path):
        return
    if os.path.islink(OLD + path):
        target = os.path.normpath(os.path.join(parent, os.readlink(OLD + path)))
        os.symlink(os.readlink(OLD + path), path)
        _bring(target)
    elif os.path.exists(OLD + path):
        _bind(path)


def _bring_folder(path: str) -> None:
    """A folder that only leads to others: empty, or the link that it is."""
    if os.path.lexists(path):
        return
    parent = os.path.dirname(path)
    if parent != "/":
        _bring_folder(parent)
    if os.path.islink(OLD + path):
        target = os.readlink(OLD + path)
        os.symlink(target, path)
        _bring_folder(os.path.normpath(os.path.join(parent, target)))
    else:
        os.mkdir(path)


def _bind(path: str) -> None:
    device = path in DEVICES
    if os.path.isdir(OLD + path):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    kernel.mount(OLD + path, path, "", kernel.MS_BIND | kernel.MS_REC)
    for place in _mounts_below(path):
        flags = os.statvfs(place).f_flag
        kept = sum(flag for seen, flag in KEPT_FLAGS if flags & seen)
        closed = 0 if device else kernel.MS_RDONLY | kernel.MS_NODEV
        kernel.mount("", place, "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_NOSUID | closed | kept)


def _mounts_below(path: str) -> list[str]:
    """The path itself, and what other file systems are mounted further down."""
    with open(f"{OLD}/proc/self/mountinfo", encoding="utf-8") as table:
        written = [line.split()[4] for line in table]  # blanks and the like as \\040
    points = [re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point) for point in written]
    return [path, *sorted({point for point in points if point.startswith(f"{path}/")})]

"""What the system lets this user have: open files, processes, shared and other memory."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.doctor import nvidia
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit

SPARE_FILES = 1024  # of libraries, logs, gloo's and NCCL's connections
ENOUGH_FILES = 65536
SHARED = Path("/dev/shm")
GIB = 1 << 30
LEAST_SHARED = GIB  # what NCCL and SGLang exchange on one machine; containers have 64 MiB unless told otherwise
LEAST_MEMORY = 4 * GIB  # a rank, before any weights
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_limits(visit: Visit) -> Iterator[Finding]:
    """Of this process; whoever is started by the same launcher has the same."""
    yield _open_files(visit)
    yield from _shared_memory(visit)
    yield _memory(visit)
    yield from _locked_memory()


def _open_files(visit: Visit) -> Finding:
    """Every response under way is a connection, and a connection is an open file of the main rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = SPARE_FILES
    if visit.settings is not None:
        sampling = visit.settings.sampling
        need += int(sampling.groups * sampling.group_size * (sampling.over_sampling if sampling.partial else 1))
    unlimited = resource.RLIM_INFINITY
    fix = f"ulimit -n {max(need, ENOUGH_FILES)} before the launch, or nofile in /etc/security/limits.conf and in the container."
    shown = "without limit" if soft == unlimited else f"{soft:,}"
    if soft != unlimited and soft < need:
        return error(f"{shown} files may be open, this run may want {need:,}", "ulimit -n", fix, soft=soft, need=need)
    if soft != unlimited and soft < ENOUGH_FILES and hard != unlimited and hard < ENOUGH_FILES and visit.settings is None:
        return warning(f"{shown} files may be open; large runs want more", "ulimit -n", fix, soft=soft, need=need)
    return well(f"{shown} files may be open", "ulimit -n", need=need)


def _shared_memory(visit: Visit) -> Iterator[Finding]:
    if not SHARED.is_dir():
        yield warning(f"there is no {SHARED}", str(SHARED), "Mount a tmpfs there: servers and NCCL exchange data in it.")
        return
    stat = os.statvfs(SHARED)
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    fix = "Start the container with --shm-size=16g or --ipc=host, or mount -o remount,size=16g /dev/shm."
    told = f"{SHARED} has {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if not os.access(SHARED, os.W_OK):
        yield error(f"{SHARED} cannot be written to", str(SHARED), "Mount it for everybody: chmod 1777.")
    elif free < LEAST_SHARED:
        several = visit.ranks_here > 1 or bool(nvidia.gpus())
        yield (error if several else warning)(told, str(SHARED), fix, free=free, total=total)
    else:
        yield well(told, str(SHARED), free=free, total=total)


def _memory(visit: Visit) -> Finding:
    """What is free now, within the container's limit."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    facts = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    limits = [int(path.read_text()) for path in CGROUPS if path.exists() and path.read_text().strip().isdecimal()]
    limit = min([facts["MemTotal"], *limits])
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    free = min(facts["MemAvailable"], limit, *([soft] if soft != resource.RLIM_INFINITY else []))
    told = f"{free / GIB:.1f} of {limit / GIB:.1f} GiB of memory are free"
    if free < LEAST_MEMORY * visit.ranks_here:
        return warning(
            f"{told}, for {visit.ranks_here} ranks",
            "/proc/meminfo, ulimit -v",
            "End other programs, ask the scheduler for more (--mem=0), or start fewer ranks here.",
            free=free,
            total=limit,
        )
    return well(told, "/proc/meminfo", free=free, total=limit)


def _locked_memory() -> Iterator[Finding]:
    """InfiniBand pins what it sends."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/sys/class/infiniband").is_dir() and soft != resource.RLIM_INFINITY:
        yield warning(
            f"{soft // 1024:,} KiB of memory may be locked, and there is InfiniBand",
            "ulimit -l",
            "ulimit -l unlimited before the launch, or memlock in /etc/security/limits.conf and in the container.",
        )

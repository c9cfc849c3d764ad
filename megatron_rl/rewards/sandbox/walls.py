"""Becoming the confined program: what its process does between fork and exec. Nothing here can be undone by what follows."""

import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megatron_rl.rewards.sandbox import kernel, new_root
from megatron_rl.rewards.sandbox.syscalls import filter_program

FIRST_USER = 0x60000000  # each run is a user of its own, of a number that no person has
INSIDE = 1000  # who the program is inside a user namespace: not root
THREADS = 64  # of a program that may start no process
OPEN_FILES = 64
STACK = 8 << 20
PATIENCE = 5  # niceness: programs give way to the sampler


def enter_namespaces(kind: str) -> None:
    """This process's next child is the first of a process namespace, and has its powers there."""
    if kind == "user":
        user, group = os.geteuid(), os.getegid()
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWPID)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {user} 1"), ("gid_map", f"{INSIDE} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    else:
        os.unshare(os.CLONE_NEWPID)


def enter_root(request: Mapping[str, Any]) -> None:
    """Own files, own network (none), own System V objects, own host name."""
    os.unshare(os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS)
    new_root.enter(request["foundation"], request["paths"], request["scratch"])


def become(request: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """Take the descriptors as 0, 1, 2 …, raise the walls, and turn into the program."""
    walls = request["walls"]
    alone = walls["namespaces"] != "none"
    os.setsid()
    os.nice(PATIENCE)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    _set_limits(request)
    os.chdir(new_root.SCRATCH if alone else "/")
    os.umask(0o077)
    kernel.drop_capabilities()
    if walls["other_user"]:
        user = FIRST_USER + request["number"]
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    kernel.prctl(kernel.NO_NEW_PRIVILEGES, 1)
    if walls["landlock"]:
        there = [path for path in request["paths"] if os.path.exists(path)]
        devices = [path for path in new_root.DEVICES if os.path.exists(path)]
        kernel.confine_files(there, [*devices, *([new_root.SCRATCH] if alone else [])])
    _forget_signals()
    if walls["seccomp"]:
        kernel.install_filter(filter_program(forks=request["processes"] > 1, alone=alone))
    os.execve(request["command"][0], request["command"], request["environment"])


def _set_limits(request: Mapping[str, Any]) -> None:
    """What the kernel counts for each process. Memory is dealt out evenly, so that the sum cannot be more."""
    walls, processes = request["walls"], request["processes"]
    limits = {
        resource.RLIMIT_AS: request["memory"] // processes,
        resource.RLIMIT_CPU: request["cpu"],
        resource.RLIMIT_FSIZE: request["scratch"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_STACK: STACK,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 100,
    }
    if walls["other_user"] or walls["namespaces"] == "user":  # elsewhere it would count all processes of the sampler's user
        tasks = processes if processes > 1 else THREADS
        limits[resource.RLIMIT_NPROC] = tasks + 2 * (walls["namespaces"] == "user")  # there keeper and first process count too
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])

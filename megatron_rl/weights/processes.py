"""Shares of work on processes of this machine, which report as they go and end with the one that started them."""

import ctypes
import heapq
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from megatron_rl.config.errors import CheckpointError, UserError

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

Moved = Callable[[int], None]
Work = Callable[..., None]  # (*arguments, moved): at the top of a module, so that another process finds it


def deal(items: Sequence[int], costs: Sequence[int], shares: int) -> list[list[int]]:
    """Items to so many shares of about the same cost: the dearest first, each to the share that has least. None is empty."""
    loads = [(0, share) for share in range(min(shares, len(items)))]
    dealt: list[list[int]] = [[] for _ in loads]
    for cost, item in sorted(zip(costs, items, strict=True), reverse=True):
        load, share = heapq.heappop(loads)
        dealt[share].append(item)
        heapq.heappush(loads, (load + cost, share))
    return [sorted(share) for share in dealt]


def run_shares(work: Work, shares: Sequence[tuple[Any, ...]], moved: Moved) -> None:
    """Do every share's work: the first here, each other one in a process of its own; `moved` hears of all progress.

    What a user can mend is raised here as it was raised there; the other processes are then ended.
    """
    if not shares:
        return
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # strips are small: threads of one process would wait for each other more than they work
    try:
        for arguments in shares[1:]:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, os.getpid(), work, arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        working = list(pipes)

        def moved_here(count: int) -> None:
            moved(count)
            _listen(working, moved, timeout=0)

        work(*shares[0], moved_here)
        while working:
            _listen(working, moved, timeout=None)
    finally:
        torch.set_num_threads(threads)
        for process, pipe in zip(processes, pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


def _listen(working: list[Connection], moved: Moved, timeout: float | None) -> None:
    """Hear what processes have to say; those that are done leave the list."""
    for pipe in wait(working, timeout):
        assert isinstance(pipe, Connection)
        try:
            heard = pipe.recv()
        except EOFError as error:
            raise InterruptedError("a process of the conversion died") from error
        if isinstance(heard, int):
            moved(heard)
        elif heard is None:
            working.remove(pipe)
        else:
            raise heard


def _child(pipe: Connection, parent: int, work: Work, arguments: tuple[Any, ...]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody goes on writing when the starter is gone
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter hears it too, and ends its processes
    torch.set_num_threads(1)
    try:
        work(*arguments, pipe.send)
        pipe.send(None)
    except (UserError, OSError) as error:
        pipe.send(CheckpointError(str(error)))

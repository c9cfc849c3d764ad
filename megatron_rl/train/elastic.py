"""torchrun that lets its ranks save: `python -m megatron_rl.train.elastic TORCHRUN'S ARGUMENTS`.

torchrun itself, told to end, gives its ranks 30 seconds, also from the moment at which the first of them has ended; nothing
sets that. And it ends with 1 whatever they ended with. Here they are told, have as long as their settings give them
(`checkpoint.grace_seconds`, after which they end themselves), and torchrun looks again when all have ended: 143 where they have
saved, else what the first ended with that has not.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_rl.train.ranks import TOLD as SAVED

TOLD = (signal.SIGTERM, signal.SIGUSR1)
GLANCE = 0.1  # seconds between looks at whether ranks have ended
LEFT_TO_TORCHRUN = "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; returns the exit code."""
    for number in TOLD:
        signal.signal(number, _tell)
    try:
        run.main([LEFT_TO_TORCHRUN, *arguments])
    except ChildFailedError as error:
        return _code(error)
    return 0


def _code(error: ChildFailedError) -> int:
    """Of the first rank that failed; one that has saved, as it was told to, did not."""
    first = min(error.failures.values(), key=lambda failure: (failure.exitcode == SAVED, failure.timestamp))
    return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode  # as a shell tells of a signal


def _tell(number: int, _: FrameType | None) -> None:
    """Pass it on to the ranks, and wait for them; while there are none nothing is lost.

    torchrun waits meanwhile, in its main thread. A rank that fails is torchrun's to deal with: the others would wait for it.
    """
    ranks = [int(word) for file in Path("/proc/self/task").glob("*/children") for word in file.read_text().split()]
    if not ranks:
        raise SystemExit(128 + number)
    for rank in ranks:
        try:
            os.kill(rank, signal.SIGTERM)
        except ProcessLookupError:
            continue
    left = set(ranks)
    while left and all(_saved(rank) for rank in ranks if rank not in left):
        time.sleep(GLANCE)
        left = {rank for rank in left if _ended(rank) is None}


def _ended(rank: int) -> int | None:
    """The exit code of a process that has ended, or the signal, negative; torchrun still gets to hear it."""
    found = os.waitid(os.P_PID, rank, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _saved(rank: int) -> bool:
    return _ended(rank) in (0, SAVED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

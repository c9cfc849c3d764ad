"""torchrun that lets its ranks save: `python -m megatron_rl.train.elastic TORCHRUN'S ARGUMENTS`.

torchrun itself, told to end, gives its ranks 30 seconds, and ends with 1 whatever they ended with. Here they are told, have as
long as their settings give them (`checkpoint.grace_seconds`), and what the first of them ends with is what this ends with: 143
where they have saved.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

TOLD = (signal.SIGTERM, signal.SIGUSR1)
LEFT_TO_TORCHRUN = "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; returns the exit code."""
    for number in TOLD:
        signal.signal(number, _tell)
    try:
        run.main([LEFT_TO_TORCHRUN, *arguments])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode  # as a shell tells of a signal
    return 0


def _tell(number: int, _: FrameType | None) -> None:
    """Pass it on to the ranks; while there are none nothing is lost."""
    ranks = [int(word) for file in Path("/proc/self/task").glob("*/children") for word in file.read_text().split()]
    if not ranks:
        raise SystemExit(128 + number)
    for rank in ranks:
        try:
            os.kill(rank, signal.SIGTERM)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

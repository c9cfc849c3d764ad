"""Processes that use a bank and die. Started once; every line of its input is a life, forked from here to start at once.

    sample PATH LIFE         keep groups without end, from many threads at once, seal now and then; somebody kills it
    crash PATH N             run the script below and die in the middle of file operation N, counted from 0
    hold PATH                open the bank for writing and wait

A life tells what it was told, one line each: `finished KEY`, `carried KEY`, `done`. `pid P` comes before, `dead` after it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_rl.config.data_settings import BankSettings
from megatron_rl.rollout.bank.writer import Bank
from tests.rollout.banks import made

write = os.write  # the system's, before operations are counted


def tell(line: str) -> None:
    write(1, f"{line}\n".encode())


def sample(path: Path, life: str) -> None:
    with Bank(path) as bank:
        stop = threading.Event()

        def worker(number: int) -> None:
            count = 0
            while not stop.is_set():
                key = f"{life}/{number}/{count}"
                bank.append(made(key, step=life_step, length=400 if count % 5 == 0 else 40))
                tell(f"finished {key}")
                count += 1

        life_step = int(life)
        threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while not stop.wait(0.02):
            keys = bank.waiting()
            if len(keys) > 10:
                bank.seal(1 + max(bank.sealed_steps(), default=0), keys[: len(keys) // 2])


def script(path: Path) -> None:
    """Everything a bank does, each thing once; run again after a crash it does what is missing."""
    with Bank(path, BankSettings(keep_steps=2)) as bank:
        for step in range(3):
            if step <= max(bank.sealed_steps(), default=-1):
                continue
            carried = f"{step}/carried"
            if carried not in bank and carried not in bank.carried():
                bank.carry(made(carried, step=step)).result()
                tell(f"carried {carried}")
            for key in (f"{step}/a", f"{step}/b", carried):
                if key not in bank:
                    bank.append(made(key, step=step))
                    tell(f"finished {key}")
            if f"{step}/left" not in bank:
                bank.append(made(f"{step}/left", step=9))
                tell(f"finished {step}/left")
            bank.seal(step)
        tell("done")


def count_operations(fatal: int) -> None:
    """The fatal one is the last thing that happens; of a write the first half still does."""
    done = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if done == fatal:
                if operation is write:
                    descriptor, data = arguments
                    write(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return operation(*arguments, **options)

        return wrapper

    for name in ("write", "fsync", "replace", "unlink", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))


def live(command: str, path: Path, rest: list[str]) -> None:
    match command:
        case "sample":
            sample(path, *rest)
        case "crash":
            count_operations(int(rest[0]))
            script(path)
        case "hold":
            with Bank(path):
                tell("holding")
                time.sleep(600)


def main() -> None:
    pa.array([0])  # the first array makes pyarrow import pandas: once here, not in every life
    for line in sys.stdin:
        command, path, *rest = line.split()
        process = os.fork()
        if process == 0:
            live(command, Path(path), rest)
            os._exit(0)
        tell(f"pid {process}")
        os.waitpid(process, 0)
        tell("dead")


if __name__ == "__main__":
    main()

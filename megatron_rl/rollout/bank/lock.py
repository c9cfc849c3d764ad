"""One writer at a time. The lock is the system's: it goes with the process that holds it, however that ends."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from megatron_rl.config.errors import BankError

TAKEN = (errno.EAGAIN, errno.EACCES)


class WriterLock:
    """An exclusive `flock` on a file that says who holds it. What a dead process wrote there does not matter."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 4096, 0)
            os.close(self._descriptor)
            if error.errno in TAKEN:
                raise BankError(f"{path.parent} is being written by {_described(holder)}. {_advice(holder)}") from error
            raise BankError(
                f"{path} cannot be locked: {error.strerror}. Put the bank on a file system that has locks (flock)."
            ) from error
        own = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, own.encode(), 0)

    def release(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _read(holder: bytes) -> tuple[int, str, str]:
    """Process, host and time as written; a holder that has just taken the lock may not have written yet."""
    try:
        values = json.loads(holder)
        return int(values["pid"]), str(values["host"]), str(values["since"])
    except (ValueError, KeyError, TypeError):
        return 0, "", ""


def _described(holder: bytes) -> str:
    process, host, since = _read(holder)
    return f"process {process} on {host} since {since}" if process else "another process"


def _advice(holder: bytes) -> str:
    process, host, _ = _read(holder)
    if process and host == socket.gethostname() and not Path(f"/proc/{process}").exists():
        return "That process is dead, and one it forked still holds the lock: end it (`lsof` on the file tells which)."
    return "End it first, or give this run a bank of its own."

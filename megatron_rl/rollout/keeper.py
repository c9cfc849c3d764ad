"""The keeper of a server: a small process between us and SGLang, which ends the server and all its children.

    python keeper.py PARENT COMMAND…

It ends the server when it is told to (SIGTERM or SIGINT), and when its parent is gone, however that came about: a parent
killed with -9 can end nothing itself. Should the keeper be killed, the kernel ends the server, whose children end with it.
A process of its own, because the kernel ties a child to the *thread* that started it, and a server must outlive threads; it
runs as a file, so that it imports nothing but what stands here.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
GLANCE = 0.2  # seconds between looks at the parent and at the server
HURRY = 1.0  # seconds until a server that waits for its open connections is told again, and stops waiting
PATIENCE = 10.0  # seconds until it is killed


def keep(parent: int, command: list[str]) -> int:
    """Run the server until it ends by itself or has to; returns its exit code."""
    told: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        told.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_end_with_keeper)
    while server.poll() is None and not told and os.getppid() == parent:
        time.sleep(GLANCE)
    _end(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask, ask again, then end what is left of the server's session."""
    for patience in (HURRY, PATIENCE - HURRY):
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(patience)
    with contextlib.suppress(ProcessLookupError):  # the whole session is gone already
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _end_with_keeper() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))

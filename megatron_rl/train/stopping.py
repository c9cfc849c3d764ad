"""Hearing that a run shall end: SIGTERM, as SLURM sends before it takes a machine away, or Ctrl-C."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HURRY = 15.0  # seconds until a run that has nothing to save yet is ended; servers of its own end with it
GLANCE = 0.2  # seconds between looks at whether it has ended


class Stopper:
    """Inside this context a first signal is only noted, and the loop saves and ends; a second Ctrl-C ends at once.

    Within `grace` seconds it has ended, or is ended: a rank whose launcher is gone would else wait for ranks that are gone too.
    Until `learns` is set there is nothing to save, and it takes seconds. What the main thread cannot hear while it waits inside
    another rank's call, a thread beside it does.
    """

    def __init__(self, grace: float) -> None:
        self.signal: int | None = None
        self.learns = False
        self._grace = grace
        self._before: dict[int, Any] = {}
        self._left = threading.Event()

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other hears signals
            self._heard, self._told = socket.socketpair()
            self._told.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._bound, name="stopping", daemon=True)
            self._thread.start()
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        for number, handler in self._before.items():  # first: ours would tell a thread that is gone
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            self._told.close()  # the thread hears it, and ends
            self._thread.join()
            self._heard.close()

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(BlockingIOError):  # full of what was told already
            self._told.send(bytes([number]))  # once more, should an event loop have taken the wake-up for itself

    def _bound(self) -> None:
        """In a thread of its own: from the first signal on the time is counted."""
        while (number := self._heard.recv(1)) and number[0] not in SIGNALS:
            continue
        begun = time.monotonic()
        while number and not self._left.wait(GLANCE):
            patience = self._grace if self.learns else min(self._grace, HURRY)
            if time.monotonic() - begun > patience:
                limit = " (checkpoint.grace_seconds)" if patience == self._grace else ""
                saved = "what the last checkpoint has is kept" if self.learns else "there was nothing to save yet"
                print(f"told to stop, and not done within {patience:g} s{limit}: ended, {saved}", file=sys.stderr)
                os._exit(128 + number[0])

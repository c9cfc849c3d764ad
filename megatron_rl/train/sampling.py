"""Sampling beside learning: an event loop in a thread of the main rank, where the session of sampling lives.

The thread that learns hands it work and waits for the answer, or does not: samples arrive while the policy learns.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any

from megatron_rl.rollout.session import Session


class SamplingThread:
    """Opens a session in a thread of its own, runs coroutines on it, and closes it at the end."""

    def __init__(self, open_session: Callable[[], AbstractAsyncContextManager[Session]]) -> None:
        self._open_session = open_session
        self.opened: Future[Session] = Future()
        self._ended: Future[None] = Future()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="sampling")
        self._thread.start()

    @property
    def session(self) -> Session:
        """Once it is open."""
        return self.opened.result(timeout=0)

    def submit[T](self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin work on the session. It must be open."""
        return asyncio.run_coroutine_threadsafe(work(self.session), self._loop)

    def call[T](self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        """The same, waiting for its result."""
        return self.submit(work).result()

    async def wait[T](self, work: Coroutine[Any, Any, T]) -> T:
        """On another event loop: the result of work on the session's."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def close(self) -> None:
        """End the session, and the servers that are ours. What goes wrong at it is raised."""
        self._closing = True
        with contextlib.suppress(AttributeError, RuntimeError):  # it has not begun, and will see; or has ended
            self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        self._ended.result(timeout=0)

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
            self._ended.set_result(None)
        except BaseException as error:
            if self.opened.done():
                self._ended.set_exception(error)
            else:
                self.opened.set_exception(error)
                self._ended.set_result(None)  # whoever asks for the session is told

    async def _live(self) -> None:
        """One task opens and closes the session, and waits in between."""
        self._task, self._leave = asyncio.current_task(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._closing:
            return
        async with self._open_session() as session:
            self.opened.set_result(session)
            await self._leave.wait()

    def _end(self) -> None:
        if self.opened.done():
            self._leave.set()
        elif self._task is not None:
            self._task.cancel()  # servers that still start are ended too

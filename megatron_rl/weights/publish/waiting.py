"""Blocking calls and answers from afar, waited for together."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import torch


async def in_thread[T](device: torch.device, function: Callable[..., T], *arguments: Any) -> T:
    """Run a blocking call in a thread of its own that nobody has to wait for.

    Unlike the threads of `asyncio.to_thread`, it does not hold up the end of the program when what it waits for never comes.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(it: Callable[[], None]) -> None:
        if not result.done():  # it is when the waiting was given up
            it()

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # which each thread chooses for itself
            found = partial(result.set_result, function(*arguments))
        except BaseException as error:
            found = partial(result.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
            loop.call_soon_threadsafe(tell, found)

    threading.Thread(target=run, daemon=True, name=f"publish {getattr(function, '__name__', 'work')}").start()
    return await result


async def together(*waited: Awaitable[Any]) -> list[Any]:
    """All results; at the first failure the others are given up and it is raised."""
    tasks = [asyncio.ensure_future(each) for each in waited]
    try:
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except BaseException:
        _give_up(tasks)
        raise
    if pending:
        _give_up(tasks)
    failures = [error for task in tasks if task in done and (error := task.exception())]
    if failures:
        raise failures[0]
    return [task.result() for task in tasks]


def _give_up(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()

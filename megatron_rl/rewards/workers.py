"""Worker processes for rewards that compute: the event loop never waits for them, and one that takes too long is killed.

A killed process is the only time-out that holds for any code: alarms do not reach threads, threads cannot be ended.
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from megatron_rl.config.errors import SettingsError
from megatron_rl.rewards.base import RewardError
from megatron_rl.rewards.worker import Hello, written
from megatron_rl.types import Prompt, Sample

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from megatron_rl.rewards.worker import main; main(int(sys.argv[1]))"
)
PATIENCE = 300.0  # seconds that a worker may take to start, on a machine however busy
LONGEST_LINE = 1 << 20


class WorkerPool:
    """Some workers, each of which can compute every reward."""

    def __init__(self, rewards: Mapping[int, tuple[str, Mapping[str, Any]]], size: int, memory: int | None) -> None:
        self.hello = Hello(rewards, memory)
        self.workers = [Worker(self.hello) for _ in range(size)]
        self.idle: asyncio.Queue[Worker] = asyncio.Queue()

    async def open(self) -> None:
        """Start all. A reward that cannot be made in a worker is a SettingsError."""
        try:
            await asyncio.gather(*(worker.start() for worker in self.workers))
        except RewardError as error:
            await self.close()
            raise SettingsError(f"rewards: {error}") from error
        for worker in self.workers:
            self.idle.put_nowait(worker)

    async def close(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    async def score(self, number: int, prompt: Prompt, text: str, sample: Sample, timeout: float) -> float:
        """What reward `number` says. The time until a worker is free, or has been started anew, does not count."""
        lean = replace(sample, routing=None)  # megabytes that no reward reads
        plain = replace(prompt, fields=dict(prompt.fields), messages=tuple(map(dict, prompt.messages)))
        message = written((number, plain, text, lean))
        worker = await self.idle.get()
        try:
            return await worker.ask(message, timeout)
        finally:
            self.idle.put_nowait(worker)


class Worker:
    """A process that is there when it is asked, whatever became of the one before."""

    def __init__(self, hello: Hello) -> None:
        self.hello = hello
        self.process: Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", START, str(os.getpid()), json.dumps([path or os.getcwd() for path in sys.path])),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            start_new_session=True,  # an interrupt at the keyboard is the sampler's to handle
        )
        try:
            async with asyncio.timeout(PATIENCE):
                answer = await self._exchange(self.process, written(self.hello))
        except TimeoutError:
            await self.stop()
            raise RewardError(f"a worker did not start within {PATIENCE:g} s") from None
        except BaseException:
            await self.stop()
            raise
        if "error" in answer:
            await self.stop()
            raise RewardError(answer["error"])

    async def ask(self, message: bytes, timeout: float) -> float:
        """The answer to a message. Whatever goes wrong, the process goes too, but for errors that it tells itself."""
        if self.process is None:
            await self.start()
        assert self.process is not None
        try:
            async with asyncio.timeout(timeout):
                answer = await self._exchange(self.process, message)
        except TimeoutError:
            await self.stop()
            raise RewardError(f"took more than {timeout:g} s and was stopped") from None
        except BaseException:
            await self.stop()
            raise
        if "error" in answer:
            raise RewardError(answer["error"])
        return float(answer["value"])

    async def _exchange(self, process: Process, message: bytes) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError, ConnectionResetError):  # it ended; the missing answer says so
            process.stdin.write(message)
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise RewardError(f"its worker process ended with {await process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        """Kill the process. It has nothing to save."""
        process, self.process = self.process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())

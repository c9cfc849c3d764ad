"""A proxy in front of a real server that breaks what passes through it, at the level of bytes."""

import asyncio
import random
from contextlib import suppress
from typing import Literal, Self

type Fault = Literal["none", "refuse", "garbage", "truncate", "trickle", "hang"]

CHUNK = 4096


class Proxy:
    """Forwards connections on `url` to a port of this machine. What `fault` says is done to every connection from then on."""

    def __init__(self, port: int, seed: int = 0) -> None:
        self.fault: Fault = "none"
        self.spoilt = 0  # pieces of what came from the server that a fault was done to
        self._port = port
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """End all connections there are."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.fault != "refuse":
                with suppress(OSError):
                    await self._forward(reader, writer)
        except asyncio.CancelledError:
            pass  # cut
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            there = asyncio.create_task(self._pour(reader, server_writer, faulty=False))
            back = asyncio.create_task(self._pour(server_reader, writer, faulty=True))
            try:
                await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
        finally:
            server_writer.transport.abort()

    async def _pour(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, faulty: bool) -> None:
        """Bytes one way, until they end or the fault ends them."""
        while data := await reader.read(CHUNK):
            self.spoilt += faulty and self.fault != "none"
            match self.fault if faulty else "none":
                case "garbage":
                    position = self._random.randrange(len(data))
                    data = data[:position] + self._random.randbytes(16) + data[position + 16 :]
                case "truncate":
                    writer.write(data[: self._random.randrange(len(data))])
                    await writer.drain()
                    return
                case "trickle":
                    for start in range(0, len(data), 64):
                        writer.write(data[start : start + 64])
                        await writer.drain()
                        await asyncio.sleep(0.02)
                    continue
                case "hang":
                    await asyncio.sleep(3600)
            writer.write(data)
            await writer.drain()

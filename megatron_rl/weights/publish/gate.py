"""Who pauses servers and lets them go on: publishing itself, or somebody who holds them all, such as a pool."""

import asyncio
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from megatron_rl.weights.publish.crew import Crew
from megatron_rl.weights.publish.ports import Halt, Held
from megatron_rl.weights.publish.protocol import Delivery


class Gate(Protocol):
    """Every rank goes through both, with the servers that it sends to."""

    async def shut(self, deliveries: Sequence[Delivery]) -> None:
        """Servers stop generating. One that does not is failed."""
        ...

    async def open(self, deliveries: Sequence[Delivery]) -> None:
        """Servers that have everything get their version and generate."""
        ...


class OwnGate:
    """Each server is paused and continued by the rank that sends to it."""

    def __init__(self, version: int) -> None:
        self._version = version

    async def shut(self, deliveries: Sequence[Delivery]) -> None:
        await asyncio.gather(*(delivery.pause() for delivery in deliveries))

    async def open(self, deliveries: Sequence[Delivery]) -> None:
        await asyncio.gather(*(delivery.complete(self._version) for delivery in deliveries))


class HeldGate:
    """Servers are held by whom the main rank knows (`halt`), who also hears which of them failed, and lets the others go on."""

    def __init__(self, version: int, crew: Crew, halt: Halt | None, current: Collection[str]) -> None:
        self._version = version
        self._crew = crew
        self._halt = halt  # on the main rank
        self._current = current  # servers that need nothing
        self._held: Held | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "HeldGate":
        return self

    async def __aexit__(self, *error: object) -> bool | None:
        return await self._stack.__aexit__(*error)  # type: ignore[arg-type]

    async def shut(self, deliveries: Sequence[Delivery]) -> None:
        failure: Exception | None = None
        if self._halt is not None:
            try:
                self._held = await self._stack.enter_async_context(self._halt())
            except Exception as error:  # raised on all ranks, which would wait
                failure = error
        urls, failure = await self._crew.alone(self._crew.ranks.from_main, (self._held and self._held.urls, failure))
        if failure is not None:
            raise failure
        for delivery in deliveries:
            delivery.hold(delivery.url in urls)

    async def open(self, deliveries: Sequence[Delivery]) -> None:
        await asyncio.gather(*(delivery.complete(self._version) for delivery in deliveries))
        told = await self._crew.alone(self._crew.ranks.everyone_has, {each.url: each.failure for each in deliveries})
        failures = {url: reason for each in told for url, reason in each.items()}
        failure: Exception | None = None
        if self._held is not None:
            for url in self._held.urls:
                reason = failures.get(url, None if url in self._current else "it could not be reached")
                if reason is not None:
                    self._held.drop(url, reason)
            try:
                await self._stack.aclose()
            except Exception as error:
                failure = error
        failure = await self._crew.alone(self._crew.ranks.from_main, failure)
        if failure is not None:
            raise failure

"""One server through one publish: pause, update, version, continue.

Whatever happens on the way, a server that was paused is either generating again with whole weights, its old or its new ones,
or quarantined: emptied of requests, left paused, and said to be so. A request never meets half an update.

While an update is under way the server's weights carry the version `UNFINISHED`, which is no version of a run. Tokens that
were sampled before the pause, and that a busy server sends only now, carry it too: theirs is read as not known.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from megatron_rl.weights.publish.ports import PauseMode, Server
from megatron_rl.weights.publish.report import Outcome, Result

UNFINISHED = -1
LAST_WORDS = 10.0  # seconds that a failed server gets to be quarantined in; one that is dead needs none

State = Literal["running", "pausing", "paused", "changing", "whole", "updated", "proving", "quarantined", "lost", "dropped"]


class Delivery:
    """What happens to one server. Steps never raise: the first failure is kept, and later steps do nothing."""

    def __init__(self, server: Server, tensor_parallel: int, mode: PauseMode, seconds: float) -> None:
        self.server = server
        self.tensor_parallel = tensor_parallel
        self.mode = mode
        self.seconds = seconds
        self.state: State = "running"
        self.failure: str | None = None
        self.held = False  # paused by somebody else, who also lets it go on
        self._paused_at = 0.0
        self._paused_for = 0.0

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def well(self) -> bool:
        return self.failure is None

    async def pause(self) -> None:
        if self.well:
            self.state = "pausing"
            self._paused_at = time.monotonic()
            if await self.attempt(lambda: self.server.pause(self.mode)):
                self.state = "paused"

    def hold(self, paused: bool) -> None:
        """Somebody else has paused it, or could not."""
        self.held = True
        self._paused_at = time.monotonic()
        if self.well and paused:
            self.state = "paused"
        else:
            self.failure = self.failure or "it could not be paused"

    async def change(self, step: Callable[[], Awaitable[object]]) -> bool:
        """A step that changes weights: from its beginning to `complete` they are neither the old nor the new ones."""
        if self.well:
            if self.state not in ("paused", "changing"):
                raise RuntimeError(f"{self.url} is {self.state}: its weights may only change while it is paused")
            self.state = "changing"
            await self.attempt(step)
        return self.well

    async def complete(self, version: int) -> None:
        """All weights are there: name them, drop what was computed with the old ones where nothing needs it, continue.

        A server that was emptied by the pause drops its cached prefixes here. One that keeps requests cannot (SGLang refuses
        to flush then): new requests must not share the prefixes of older versions (the client's `cache_key`).
        """
        if self.well and await self.attempt(lambda: self._name(version)):
            self.state = "whole"
            if self.held or await self.attempt(self.server.resume):
                self.state = "updated"
                self._paused_for += time.monotonic() - self._paused_at

    async def prove(self, step: Callable[[], Awaitable[object]]) -> None:
        """A look at the new weights; until `trust` the server has not passed."""
        if self.well:
            self.state = "proving"
            await self.attempt(step)

    def trust(self) -> None:
        if self.well and self.state == "proving":
            self.state = "updated"

    def distrust(self, reason: str) -> None:
        """The weights are whole and wrong."""
        self.failure = self.failure or reason
        self.state = "proving"

    def outcome(self, difference: float | None) -> Outcome:
        """What to report, after `settle`."""
        results: dict[State, Result] = {
            "updated": "updated",
            "quarantined": "quarantined",
            "lost": "lost",
            "dropped": "dropped",
        }
        return Outcome(self.url, results.get(self.state, "unchanged"), self.failure, self._paused_for, difference)

    async def settle(self) -> None:
        """The way out, whatever happened: a server with its old weights continues, one with half of the new is put aside."""
        if self.held:
            if self.state in ("changing", "whole", "proving"):
                self.state = "dropped"
        elif self.state == "running" and not self.well:  # it failed before it was paused: is it there at all?
            self.state = "running" if await self._in_time(self.server.server_info) else "lost"
        elif self.state in ("pausing", "paused"):
            self.state = "running" if await self._in_time(self.server.resume) else "lost"
        elif self.state in ("changing", "whole", "proving"):
            self.failure = self.failure or "the update was given up half-way"
            self.state = "quarantined" if await self._in_time(self._quarantine) else "lost"

    async def attempt(self, step: Callable[[], Awaitable[object]]) -> bool:
        """Do a step that the server may fail at."""
        try:
            async with asyncio.timeout(self.seconds):
                await step()
        except TimeoutError as error:
            self.failure = f"no answer within {self.seconds:g} s (servers.update_seconds) {error}".strip()
        except Exception as error:  # whatever it was, this server's weights are not to be trusted, and the others go on
            self.failure = f"{error}" if str(error) else repr(error)
        return self.failure is None

    async def _name(self, version: int) -> None:
        await self.server.set_version(version)
        if self.mode == "abort" and not self.held:
            await self.server.flush_cache()

    async def _quarantine(self) -> None:
        """End all requests and leave the server paused.

        A frozen request ends only when the server runs, so it does for a moment: what it samples then is marked `UNFINISHED`.
        """
        await self.server.abort_all()
        await self.server.resume()
        await self.server.pause("abort")

    async def _in_time(self, step: Callable[[], Awaitable[object]]) -> bool:
        try:
            async with asyncio.timeout(LAST_WORDS):
                await step()
        except Exception as error:
            self.failure = f"{self.failure or 'the update went well'}; then it could not be reached: {error or repr(error)}"
            return False
        return True

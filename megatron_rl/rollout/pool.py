"""All servers as one: responses are asked of the pool, and come back whole whatever becomes of a server.

A server that dies, hangs, babbles or is updated costs the requests that it was working on at that moment, and of those only
what it had not yet streamed: the rest is asked of another server (`growing`). Only generation is ever repeated, which changes
nothing on a server; control calls are not.

**Versions of weights.** A server reports a version in each piece of a stream: the one that it has when it sends the piece. Two
things make this exact for every token. With servers.update=abort an update ends all responses before it begins, tokens and
all, and what is left of them is asked for anew. With retract and in_place responses live on; then a piece is a single token,
and an update begins only after the server's scheduler has confirmed its pause: a token from before that a busy server sends
later than that has no version, never a wrong one, because weights have none while they change (`publish.protocol`).
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Sampling, new_request
from megatron_rl.rollout.connection import Key
from megatron_rl.rollout.dispatch import Desk, Homes
from megatron_rl.rollout.errors import Refused, ServerError
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.growing import Decode, Growing
from megatron_rl.rollout.replies import Finish, Generation
from megatron_rl.rollout.server import ServerOptions
from megatron_rl.rollout.suitability import Demands
from megatron_rl.rollout.worker import Worker

FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0  # seconds before a response is tried again, doubling
ABORTED = 499  # status of a request that was aborted while its server was paused
GLANCE = 1.0  # seconds between looks at whether any server works


class GenerationFailed(RuntimeError):
    """A response that no server could finish."""


class NoServer(RuntimeError):
    """No server has worked for too long."""


@dataclass(eq=False)
class Waiting:
    """A response in the queue; `place` is the server it gets, or nobody when sampling was interrupted."""

    group: str
    weight: int
    place: "asyncio.Future[Worker | None]"


class Pool:
    """Generates on all servers of its fleet. Use it as a context."""

    def __init__(
        self,
        settings: ServerSettings,
        demands: Demands,
        *,
        api_key: Key = None,
        version: int = 0,
        decode: Decode | None = None,
    ) -> None:
        """`version` is that of the weights which servers have at the start; `decode` is needed for stop texts alone."""
        self._settings = settings
        self._demands = demands
        self._decode = decode
        self._homes = Homes()
        self._queue: deque[Waiting] = deque()
        self._interruptions = 0
        self._watching: asyncio.Task[None] | None = None
        self._too_heavy = math.inf  # no server but one that is freed has room for this weight, or for more
        self.fleet = Fleet(settings, demands, api_key, version, self._servers_changed)

    async def begin(self, own: Sequence[ServerOptions] = ()) -> None:
        """Start servers of our own and meet the others; see `Fleet.begin`."""
        await self.fleet.begin(own)
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End the servers that are ours; responses under way fail."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        self._dismiss(NoServer("The pool was closed."))
        await self.fleet.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(self, tokens: Sequence[int] | NDArray[np.int64], sampling: Sampling, *, group: str) -> Generation:
        """One response. Those of one group share a server's prefix cache where they can.

        It comes back whole, or with finish "abort" and what it has by then when sampling is interrupted. A request that a
        server refuses, such as one that is too long, is Refused; one that servers keep failing at is GenerationFailed.
        """
        piece = self._settings.piece if self._settings.update == "abort" else 1
        growing = Growing(tokens, replace(sampling, piece=piece), self._decode)
        interruptions, failures = self._interruptions, list[ServerError]()
        while not growing.full:
            worker = await self._place(group, growing.weight) if self._interruptions == interruptions else None
            if worker is None:
                return growing.generation("abort")
            length = growing.length
            try:
                finish = await self._attempt(worker, growing)
            except ServerError as error:
                failures.append(error)
                await self._after_failure(failures, interruptions)
                continue
            finally:
                worker.desk.finish(growing.weight)
                self._hand_out(worker)
            if finish != "abort":
                worker.request_done()
                return growing.generation(finish)
            if growing.length == length and worker.works and self._interruptions == interruptions:
                failures.append(ServerError(worker.url, "/generate", "somebody else aborted it"))
                await self._after_failure(failures, interruptions)
        return growing.generation("length")

    async def interrupt(self) -> None:
        """End what is under way; it comes back as it is, with finish "abort". What is asked for afterwards is not touched."""
        self._interruptions += 1
        self._dismiss(None)
        attempts = [(worker, *attempt) for worker in self.fleet.everybody() for attempt in worker.attempts.items()]
        await asyncio.gather(*(self._end(worker, request, attempt) for worker, request, attempt in attempts))

    async def _end(self, worker: Worker, request: str, attempt: "asyncio.Task[object]") -> None:
        """Ask the server for an end, which brings all tokens and the routing; one that does not answer is left."""
        try:
            await self.fleet.abort(worker, request)
            await asyncio.wait([attempt], timeout=self._settings.answer_seconds)
        except ServerError as error:
            worker.request_failed(str(error))
        attempt.cancel()

    async def _attempt(self, worker: Worker, growing: Growing) -> Finish:
        """Let a server go on with a response. It may be withdrawn from the server, by cancelling the attempt."""
        request = new_request()
        attempt = asyncio.create_task(self._stream(worker, request, growing))
        worker.attempts[request] = attempt
        try:
            return await attempt
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise ServerError(worker.url, "/generate", "the request was withdrawn") from None
        except Refused as refused:
            if refused.status == ABORTED:
                return "abort"
            if refused.is_overload:
                worker.request_failed(str(refused))
            raise
        except ServerError as error:
            worker.request_failed(str(error))
            raise
        finally:
            del worker.attempts[request]

    async def _stream(self, worker: Worker, request: str, growing: Growing) -> Finish:
        tokens, sampling = growing.rest()
        stream = worker.client.stream(
            tokens, sampling, request=request, routing=self._demands.routing, cache_key=str(self.fleet.version)
        )
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                growing.absorb(piece, worker.stride)
                if piece.finish is not None:
                    return "stop" if growing.stopped else piece.finish
                if growing.stopped:  # an abort brings the rest of what was computed, and the routing with it
                    await self.fleet.abort(worker, request)
        raise AssertionError("a stream ends with its response, or with an error")

    async def _after_failure(self, failures: Sequence[ServerError], interruptions: int) -> None:
        """Wait before the next try, the longer the more failed. What cannot go well elsewhere is not tried elsewhere."""
        last = failures[-1]
        if isinstance(last, Refused) and not last.is_overload:
            raise last
        if len(failures) > self._settings.tries:
            told = "\n".join(f"  {failure}" for failure in failures)
            raise GenerationFailed(f"{len(failures)} tries at a response failed (servers.tries):\n{told}") from last
        if self._interruptions == interruptions and len(failures) > 1:
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2 ** (len(failures) - 2)))

    # The queue.

    async def _place(self, group: str, weight: int) -> Worker | None:
        """The server that works on the response next, as soon as one has room; nobody if sampling is interrupted before."""
        waiting = Waiting(group, weight, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._hand_out()
        try:
            return await waiting.place
        except asyncio.CancelledError:
            given, freed = waiting.place, None
            if not given.cancelled() and given.exception() is None and (freed := given.result()) is not None:
                freed.desk.finish(weight)  # cancelled in the moment between the gift and its acceptance
            self._hand_out(freed)  # whoever stood behind it may ask for less
            raise

    def _servers_changed(self) -> None:
        """One has come, gone, or is well again: whatever was known of room is not."""
        self._too_heavy = math.inf
        self._hand_out()

    def _hand_out(self, freed: Worker | None = None) -> None:
        """Give those in front of the queue to servers that have room; `freed` is one that has just finished something.

        While all are busy that one alone can have got room for what none had room for: to ask a hundred servers for each of
        tens of thousands of responses would cost more than all else that is done for them here.
        """
        while self._queue:
            first = self._queue[0]
            if not first.place.done():
                worker = self._homes.choose(first.group, self._to_ask(first.weight, freed), first.weight)
                if worker is None:
                    self._too_heavy = first.weight
                    return
                worker.desk.take(first.weight)
                first.place.set_result(worker)
            self._queue.popleft()
        self._too_heavy = math.inf  # from here on servers finish without being looked at

    def _to_ask(self, weight: int, freed: Worker | None) -> Iterable[tuple[Worker, Desk]]:
        """Servers that may have room for so much."""
        if weight < self._too_heavy or self.fleet.router is not None:
            return self.fleet.at_work()
        return [(freed, freed.desk)] if freed is not None and freed.works else []

    def _dismiss(self, error: Exception | None) -> None:
        """Send everybody in the queue away, with an error or without a server."""
        for waiting in self._queue:
            if not waiting.place.done() and error is not None:
                waiting.place.set_exception(error)
            elif not waiting.place.done():
                waiting.place.set_result(None)
        self._queue.clear()

    async def _watch(self) -> None:
        """Without a server for too long, whoever waits is told."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(GLANCE)
            fleet = self.fleet
            if any(fleet.at_work()) or fleet.updating or fleet.starting or fleet.asleep:
                last = loop.time()
            elif loop.time() - last > self._settings.outage_seconds:
                told = f"No server has worked for {self._settings.outage_seconds:.0f} s (servers.outage_seconds):\n"
                self._dismiss(NoServer(told + self.fleet.states()))

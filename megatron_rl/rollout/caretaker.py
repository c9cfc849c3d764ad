"""Looks after one server: waits for it, admits it to work, probes it, restarts it, and knows when it is past help."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from megatron_rl.config.errors import UserError
from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.dispatch import Capacity
from megatron_rl.rollout.errors import Refused, ServerError, TimedOut, Unreachable
from megatron_rl.rollout.health import Asleep, Dead, Health, Healthy, Left, Outdated, Paused, Quarantined, Starting, Suspect
from megatron_rl.rollout.keys import beside_urls
from megatron_rl.rollout.replies import ServerInfo
from megatron_rl.rollout.server import start_again
from megatron_rl.rollout.suitability import Demands, UnsuitableServer, inspect
from megatron_rl.rollout.worker import Worker

logger = logging.getLogger(__name__)

type Load = Callable[[Client], Awaitable[None]]  # brings one server to the current weights

HURRY = 1.0  # seconds between looks at a suspect
FLUSHES = 5  # tries at a flush
LONGEST_REST = 3  # doublings of the time between looks at a quarantined server, or between restarts


@dataclass
class Weights:
    """The weights that responses come from now. `lock` is held while those of any server change, and while all lie down."""

    version: int
    asleep: bool = False  # the trainer has the GPUs: who comes now sleeps too, who died is not started yet
    load: Load | None = None  # None: only the next update brings a server that missed one back
    brought: bool = False  # by an update: a server that starts anew does not have them, whatever number it gives to its own
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


async def flush(client: Client) -> None:
    """Free what old weights left in a server's prefix cache. Nobody would read it (`cache_key`), so a refusal is no harm."""
    for _ in range(FLUSHES):
        try:
            await client.flush_cache()
            return
        except Refused as refused:  # a server is done with its last response a moment after that has arrived
            last = refused
            await asyncio.sleep(0.1)
    logger.warning("the prefix cache of old weights stays: %s", last)


class Caretaker:
    """One for each server, for as long as it is in the pool."""

    def __init__(
        self,
        worker: Worker,
        demands: Demands,
        settings: ServerSettings,
        weights: Weights,
        make_client: Callable[[str], Client],
    ) -> None:
        self._worker = worker
        self._demands = demands
        self._settings = settings
        self._weights = weights
        self._make_client = make_client

    async def run(self) -> None:
        """Until the server has left. A mistake of our own costs this server its work, and is told: others wait for it."""
        worker = self._worker
        while not isinstance(worker.health, Left):
            worker.look.clear()
            try:
                await self._look_after()
            except Exception as error:
                logger.exception("server %s: looking after it failed", worker.url)
                if not isinstance(worker.health, Dead | Left):
                    worker.become(Quarantined(f"looking after it failed: {error!r}"))
                await self._wait(HURRY, heed_look=False)

    async def _look_after(self) -> None:
        """What its health asks for now."""
        match self._worker.health:
            case Starting():
                await self._begin()
            case Healthy() | Suspect():
                await self._probe()
            case Quarantined():
                await self._call_back()
            case Dead():
                await self._restart()
            case Paused() | Outdated() | Asleep():
                await self._wait(self._settings.probe_seconds)
                self._notice_death()

    async def _begin(self) -> None:
        worker = self._worker
        try:
            if worker.server is not None:
                await worker.server.ready()
            await self._admit()
        except (UserError, ServerError) as error:
            own = worker.server is not None and not worker.server.alive
            self._move(Starting, Dead(str(error)) if own else Quarantined(self._told(error)))

    async def _probe(self) -> None:
        """A look after a while, or at once at a suspect."""
        worker = self._worker
        if isinstance(worker.health, Healthy):
            await self._wait(self._settings.probe_seconds)
        if self._notice_death() or not isinstance(worker.health, Healthy | Suspect):
            return
        before = worker.health
        reason = await self._complaint()
        if worker.health is not before:
            return  # it was paused or put to sleep meanwhile, and answers no such question then
        if reason is not None:
            worker.probe_failed(reason)
            await self._wait(min(HURRY, self._settings.probe_seconds))
        elif isinstance(worker.health, Suspect):
            worker.become(Healthy())

    async def _call_back(self) -> None:
        """After a rest: is it well, and what weights has it? One of our own that does not recover is killed."""
        worker = self._worker
        await self._rest(self._settings.probe_seconds * 2 ** min(max(worker.rests - 1, 0), LONGEST_REST))
        if self._notice_death() or not isinstance(worker.health, Quarantined) or self._weights.asleep:
            return
        try:
            await self._wake()
            reason = await self._complaint()
            if reason is None:
                await self._admit()
                return
        except (UserError, ServerError) as error:
            reason = self._told(error)
        if worker.server is not None and worker.rests > worker.forgiven:
            await asyncio.to_thread(worker.server.kill)
            self._move(Quarantined, Dead(f"killed, since it did not recover: {reason}"))
        else:
            self._move(Quarantined, Quarantined(reason))

    async def _wake(self) -> None:
        """An update may have failed while the server was paused, or half awake."""
        await self._worker.client.rouse()

    async def _restart(self) -> None:
        """Start a server of our own again at its old address; others stay dead until they are told to go."""
        worker = self._worker
        if worker.server is None or worker.restarts >= self._settings.restarts:
            await self._wait(None)
            return
        await self._wait(min(2.0**worker.restarts, 2.0**LONGEST_REST), heed_look=False)
        async with self._weights.lock:  # who lays all down meets it dead or starting, not in between
            if not isinstance(worker.health, Dead) or self._weights.asleep:
                return
            worker.restarts += 1
            worker.server = await start_again(worker.server)
            worker.strikes = worker.rests = 0
            worker.torn = self._weights.brought
            await worker.client.close()
            worker.client = self._make_client(worker.url)
            self._move(Dead, Starting())

    async def _admit(self) -> None:
        """Let it work if it can do what is asked and has the current weights, which it is given if there is a way to."""
        worker, weights, before = self._worker, self._weights, self._worker.health
        info = await inspect(worker.client, self._demands)
        worker.desk.resize(self._capacity(info))
        worker.stride = info.stride
        worker.torn = worker.torn or info.state != "whole"
        async with weights.lock:
            if weights.asleep:
                worker.torn = True
                await worker.client.sleep()
                self._move(type(before), Asleep())
                return
            version = await self._version(info)
            if weights.load is not None and (version != weights.version or worker.torn):
                worker.torn = True
                await worker.client.pause("abort")
                await weights.load(worker.client)
                await flush(worker.client)
                await worker.client.resume()
                version = (await worker.client.model_info()).version
                worker.torn = False
            if version == weights.version and not worker.torn:
                self._move(type(before), Healthy())
            else:
                has = "none of a run's weights, or half of them" if worker.torn else f"weights {version}"
                self._move(type(before), Outdated(f"it has {has}, the others {weights.version}"))

    async def _version(self, info: ServerInfo) -> int | None:
        """Weights that were never updated are version 0, whatever their server calls them, until a run has brought its own."""
        weights = self._weights
        if info.version is None and weights.version == 0 and not weights.brought and not self._worker.torn:
            await self._worker.client.set_version(0)
            return 0
        return info.version

    def _capacity(self, info: ServerInfo) -> Capacity:
        most = self._settings.max_in_flight
        requests = info.max_requests if most is None else min(most, info.max_requests)
        return Capacity(requests, self._settings.over_commit * info.pool_tokens)

    async def _complaint(self) -> str | None:
        """What is wrong with it, if something is."""
        try:
            return None if await self._worker.client.healthy() else "it says that it is not well"
        except ServerError as error:
            return self._told(error)

    def _told(self, error: Exception) -> str:
        """What is wrong, with where we have its URL from if nobody answers there, and where its key if that is refused."""
        cause = error if isinstance(error, ServerError) else error.__cause__
        file, own = self._worker.file, self._settings
        if file is not None and isinstance(cause, Unreachable | TimedOut):
            return (
                f"{cause}. Its URL is in {file}: the job that wrote it there may be gone, and one that was killed with -9 "
                "takes nothing out. Remove the line then"
            )
        key = own.api_key_file or (own.urls_file and beside_urls(own.urls_file))
        if key is not None and isinstance(cause, Refused) and cause.is_for_the_key:
            return f"{cause}. Its key was looked for in {key}, {'and is another' if key.exists() else 'which is not there yet'}"
        return str(error)

    def _notice_death(self) -> bool:
        worker = self._worker
        if worker.server is None or worker.server.alive or isinstance(worker.health, Dead | Left):
            return False
        worker.become(Dead(f"its process ended; its last words are in {worker.server.options.log}"))
        return True

    def _move(self, expected: type, new: Health) -> None:
        """Change its health, unless something else happened to it meanwhile."""
        if type(self._worker.health) is expected:
            self._worker.become(new)

    async def _rest(self, seconds: float) -> None:
        """So long; the end of a process of our own is noticed at once, and whoever waits for its successor waits less."""
        while seconds > 0 and isinstance(self._worker.health, Quarantined) and not self._notice_death():
            await self._wait(min(seconds, HURRY), heed_look=False)
            seconds -= HURRY

    async def _wait(self, seconds: float | None, *, heed_look: bool = True) -> None:
        """So long, or until there is a reason to look. A rest is cut short by nothing but its leaving."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._worker.look.wait()
                while not heed_look and not isinstance(self._worker.health, Left):
                    self._worker.look.clear()
                    await self._worker.look.wait()


class RouterCaretaker(Caretaker):
    """Looks after a router: it has no weights, and only has to pass generation on to servers that we know."""

    def __init__(
        self,
        worker: Worker,
        demands: Demands,
        settings: ServerSettings,
        weights: Weights,
        make_client: Callable[[str], Client],
        known: Callable[[], Iterable[str]],
    ) -> None:
        super().__init__(worker, demands, settings, weights, make_client)
        self._known = known

    async def _wake(self) -> None:
        """A router is never paused."""

    async def _admit(self) -> None:
        worker, before = self._worker, self._worker.health
        behind = await worker.client.behind()
        if behind is None:
            logger.warning(
                "servers.router = %s does not tell its servers; each must be in servers.urls or the file", worker.url
            )
        unknown = set(behind or ()) - set(self._known())
        if unknown:
            raise UnsuitableServer(
                f"The router {worker.url} passes requests to {', '.join(sorted(unknown))}, which new weights would not reach. "
                "Name them in servers.urls or servers.urls_file, or take them from the router."
            )
        reason = await self._complaint()
        if reason is not None:
            raise UnsuitableServer(f"The router {worker.url} cannot pass requests on: {reason}. Correct servers.router.")
        self._move(type(before), Healthy())

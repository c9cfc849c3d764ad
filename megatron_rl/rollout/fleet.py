"""The servers of a run: who is among them, how new weights reach all of them, and who comes and goes meanwhile."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.caretaker import Caretaker, Load, RouterCaretaker, Weights, flush
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.connection import Key, Patience
from megatron_rl.rollout.dispatch import Capacity, Desk
from megatron_rl.rollout.errors import ServerError
from megatron_rl.rollout.health import Asleep, Dead, Healthy, Left, Outdated, Paused, Quarantined, Starting, Suspect, name
from megatron_rl.rollout.server import Server, ServerOptions, free_ports, stop_servers
from megatron_rl.rollout.suitability import Demands, UnsuitableServer
from megatron_rl.rollout.urls_file import read_urls
from megatron_rl.rollout.worker import Worker

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 60.0  # for requests to end that a pause has ended


class UpdateFailed(RuntimeError):
    """No server got the new weights."""


class Update:
    """New weights on their way to the servers that are paused for them."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = list(workers)
        self.dropped: dict[str, str] = {}

    @property
    def clients(self) -> list[Client]:
        """Of the servers that take part."""
        return [worker.client for worker in self._workers if worker.url not in self.dropped]

    def drop(self, client: Client, reason: str) -> None:
        """This server failed at the update. The others go on; it is quarantined, and its weights count as none."""
        self.dropped[client.url] = reason


class Fleet:
    """The servers, each with its caretaker. `changed` is called whenever the health of one has changed."""

    def __init__(
        self, settings: ServerSettings, demands: Demands, api_key: Key, version: int, changed: Callable[[], None]
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.router: Worker | None = None  # generation goes through it, if there is one
        self._settings = settings
        self._demands = demands
        self._api_key = api_key
        self._changed = changed
        self._weights = Weights(version)
        self._cares: dict[Worker, asyncio.Task[None]] = {}
        self._leaving: dict[Worker, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._misread = ""  # why the file of URLs cannot be read now

    @property
    def version(self) -> int:
        """Of the weights that responses come from."""
        return self._weights.version

    @property
    def updating(self) -> bool:
        return self._weights.lock.locked()

    @property
    def starting(self) -> bool:
        """Does a server of our own start? It has a time-out of its own (servers.start_seconds)."""
        return any(isinstance(worker.health, Starting) and worker.server is not None for worker in self.workers.values())

    @property
    def asleep(self) -> bool:
        """Has the trainer the GPUs? The next update wakes the servers."""
        return self._weights.asleep

    # Coming and going.

    async def begin(self, own: Sequence[ServerOptions] = ()) -> None:
        """Start servers of our own, meet the others, and wait until they work. One that cannot is UnsuitableServer."""
        if callable(self._api_key):
            self._api_key()  # what cannot be read is told before anybody waits; what is not there yet is None
        try:
            for options, port in zip(own, free_ports(len(own)), strict=True):
                server = Server.start(options, port)
                self._add(server.url, server)
            for url in self._settings.urls:
                self.join(url)
            await self._settled(list(self.workers.values()))
            if self._settings.urls_file is not None:
                await self._read_file(self._settings.urls_file)
                self._watching = asyncio.create_task(self._watch_file(self._settings.urls_file))
                await self._some_work()
            if self._settings.router is not None:
                await self._meet_router(self._settings.router)
        except BaseException:
            await self.close()
            raise

    def join(self, url: str, file: Path | None = None) -> Worker:
        """A server that somebody else runs. It gets work once it has been found well and suitable. `file` names it."""
        url = url.rstrip("/")
        return self.workers.get(url) or self._add(url, None, file)

    def leave(self, url: str) -> None:
        """No new work for this server. What it works on may finish; its end, if it comes, is taken as any other's."""
        worker = self.workers.pop(url.rstrip("/"), None)
        if worker is None:
            raise KeyError(f"{url} is not among the servers: {', '.join(self.workers)}")
        worker.become(Left())
        self._leaving[worker] = asyncio.create_task(self._see_off(worker, self._cares.pop(worker)))

    async def close(self) -> None:
        """End what we started, and let the others go."""
        tasks = [*self._cares.values(), *self._leaving.values(), *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers = self.everybody()
        self.workers.clear()
        self._leaving.clear()
        await asyncio.gather(*(worker.client.close() for worker in workers))
        await stop_servers([worker.server for worker in workers if worker.server is not None])

    def everybody(self) -> list[Worker]:
        """All servers, also those that only finish what they have, and the router."""
        return [*self.workers.values(), *self._leaving, *([self.router] if self.router else [])]

    def at_work(self) -> Iterator[tuple[Worker, Desk]]:
        """Who gets requests, with what it has to do.

        A router gets all, as many as its servers take together. What it does not know is which of them has old weights: as
        long as one has, it gets none.
        """
        working = [worker for worker in self.workers.values() if worker.works]
        if self.router is None:
            yield from ((worker, worker.desk) for worker in working)
        elif working and self.router.works and not any(isinstance(w.health, Paused | Outdated) for w in self.workers.values()):
            capacities = [worker.desk.capacity for worker in working]
            self.router.desk.resize(Capacity(sum(c.requests for c in capacities), sum(c.tokens for c in capacities)))
            self.router.stride = max(worker.stride for worker in working)
            yield self.router, self.router.desk

    async def abort(self, worker: Worker, request: str) -> None:
        """End a request; one that a router has passed on is some server's."""
        servers = self.workers.values() if worker is self.router else [worker]
        await asyncio.gather(*(server.client.abort(request) for server in servers))

    def states(self) -> str:
        """All servers with their health, for messages."""
        lines = (
            f"  {worker.url}: {name(worker.health)}{f' ({reason})' if (reason := getattr(worker.health, 'reason', '')) else ''}"
            for worker in self.workers.values()
        )
        return "\n".join(lines) or "  there are none"

    # New weights.

    async def update(self, version: int, load: Load) -> dict[str, str]:
        """Bring every server to new weights by a call to each, and whoever comes later; returns who failed at it and why.

        If all fail it is UpdateFailed, and the next update is as if this one had not been.
        """

        async def one(client: Client) -> None:
            try:
                await load(client)
            except ServerError as error:
                update.drop(client, str(error))

        async with self.paused(version, load) as update:
            await asyncio.gather(*map(one, update.clients))
        return update.dropped

    @asynccontextmanager
    async def paused(self, version: int, load: Load | None = None) -> AsyncIterator[Update]:
        """Pause all servers while the caller brings them to new weights; then they go on, those that have them.

        Those that sleep are woken instead. `load` brings one server there later, by a way of its own: one that was away, or
        comes new. An exception of the caller leaves no server with weights to be trusted; the next update does.
        """
        async with self._weights.lock:
            well = [each for each in self.workers.values() if isinstance(each.health, Healthy | Suspect | Outdated | Asleep)]
            for worker in well:
                worker.become(Paused())
            await asyncio.gather(*map(self._halt, well))
            workers = [worker for worker in well if isinstance(worker.health, Paused)]
            update = Update(workers)
            for worker in workers:
                worker.torn = True
            try:
                yield update
                if update.dropped and not update.clients:
                    told = "\n".join(f"  {url}: {reason}" for url, reason in update.dropped.items())
                    raise UpdateFailed(f"No server took weights {version}:\n{told}")
            except BaseException as error:
                for worker in workers:
                    self._quarantine(worker, f"an update of its weights failed: {error!r}")
                raise
            for worker in workers:
                if worker.url in update.dropped:
                    self._quarantine(worker, f"an update of its weights failed: {update.dropped[worker.url]}")
            if not self._weights.brought:
                for worker in self.workers.values():
                    worker.torn = True  # who took no part may give this number to the weights that it was started with
            self._weights.version, self._weights.load, self._weights.brought = version, load, True
            await asyncio.gather(*map(self._resume, workers))
            self._weights.asleep = False

    async def lie_down(self) -> None:
        """All servers give their memory back, until the next update.

        One that does not is quarantined. One of our own is killed then, since the trainer counts on the memory, and started
        again when the others have been woken; one that is starting now is waited for.
        """
        async with self._weights.lock:
            self._weights.asleep = True
            for worker in self.workers.values():
                if isinstance(worker.health, Healthy | Suspect | Outdated):
                    worker.become(Paused())
            await asyncio.gather(*map(self._lay_down, self.workers.values()))
        ours = [worker for worker in self.workers.values() if worker.server is not None]
        while any(isinstance(worker.health, Starting) for worker in ours):
            await asyncio.sleep(0.05)
        await asyncio.gather(*map(self._lay_down, ours))

    async def _lay_down(self, worker: Worker) -> None:
        if isinstance(worker.health, Paused):
            await self._pause(worker)
        if isinstance(worker.health, Paused):
            worker.torn = True
            try:
                await worker.client.sleep()
            except ServerError as error:
                self._quarantine(worker, f"it did not give its memory back: {error}")
        if isinstance(worker.health, Paused):
            worker.become(Asleep())
        if isinstance(worker.health, Quarantined) and worker.server is not None:
            worker.become(Dead(f"killed, since it would have kept the trainer's memory: {worker.health.reason}"))
            await asyncio.to_thread(worker.server.kill)

    async def _halt(self, worker: Worker) -> None:
        """Have it ready for new weights. A server of our own takes memory for its keys and values only behind them."""
        if not worker.client.asleep:
            await self._pause(worker)
            return
        try:
            await (worker.client.wake() if worker.server is None else worker.client.wake("weights"))
        except ServerError as error:
            self._quarantine(worker, f"it could not be woken: {error}")

    async def expect(self, version: int) -> None:
        """These weights are the present ones, though no server got them. Nobody works before an update has brought them."""
        async with self._weights.lock:
            self._weights.version, self._weights.load, self._weights.brought = version, None, True
            self._weights.asleep = False
            for worker in self.workers.values():
                worker.torn = True
                if isinstance(worker.health, Healthy | Suspect | Asleep):
                    worker.become(Quarantined(f"weights {version} did not reach it"))

    async def _pause(self, worker: Worker) -> None:
        mode = self._settings.update
        try:
            if mode == "abort":
                await worker.client.abort_all()
                attempts = (self.router or worker).attempts
                if attempts:  # a server that still works on any looks again only after a second
                    await asyncio.wait(attempts.values(), timeout=DRAIN_SECONDS)
            await worker.client.pause(mode)
        except ServerError as error:
            self._quarantine(worker, f"it could not be paused: {error}")

    async def _resume(self, worker: Worker) -> None:
        """Back to work, if it reports the new weights."""
        if not isinstance(worker.health, Paused):
            return
        try:
            version = (await worker.client.model_info()).version
            if version != self._weights.version:
                self._quarantine(worker, f"after the update to weights {self._weights.version} it reports {version}")
                return
            if worker.client.asleep:
                await worker.client.wake()
            if self._settings.update == "abort":
                await flush(worker.client)
            await worker.client.resume()
        except ServerError as error:
            self._quarantine(worker, f"it did not go on after an update: {error}")
            return
        if isinstance(worker.health, Paused):
            worker.torn = False
            worker.become(Healthy())

    def _quarantine(self, worker: Worker, reason: str) -> None:
        if isinstance(worker.health, Paused):
            worker.become(Quarantined(reason))

    # The rest.

    def _add(self, url: str, server: Server | None, file: Path | None = None) -> Worker:
        worker = Worker(self._client(url), self._changed, self._settings.probes, server, file, torn=self._weights.brought)
        self.workers[url] = worker
        caretaker = Caretaker(worker, self._demands, self._settings, self._weights, self._client)
        self._cares[worker] = asyncio.create_task(caretaker.run())
        return worker

    def _client(self, url: str) -> Client:
        own = self._settings
        patience = Patience(answer=own.answer_seconds, silence=own.silence_seconds, update=own.update_seconds)
        return Client(url, self._demands.vocabulary, self._api_key, patience)

    async def _meet_router(self, url: str) -> None:
        if self._demands.routing is not None:
            raise UnsuitableServer(
                f"servers.router = {url}: a router drops the routing that replay needs. Remove servers.router, or the replay."
            )
        self.router = Worker(self._client(url.rstrip("/")), self._changed, self._settings.probes)
        caretaker = RouterCaretaker(
            self.router, self._demands, self._settings, self._weights, self._client, lambda: self.workers
        )
        self._cares[self.router] = asyncio.create_task(caretaker.run())
        await self._settled([self.router])

    async def _see_off(self, worker: Worker, care: asyncio.Task[None]) -> None:
        """Wait for its requests to end, then let it go."""
        await asyncio.gather(care, *worker.attempts.values(), return_exceptions=True)
        await worker.client.close()
        if worker.server is not None:
            await asyncio.to_thread(worker.server.stop)
        del self._leaving[worker]

    async def _settled(self, workers: Iterable[Worker]) -> None:
        """Wait until each has been met; what is wrong with any is the caller's to hear."""
        problems = []
        for worker in workers:
            while isinstance(worker.health, Starting):
                await asyncio.sleep(0.05)
            if isinstance(worker.health, Dead | Quarantined):
                problems.append(worker.health.reason)
        if problems:
            raise UnsuitableServer("\n".join(problems))

    async def _some_work(self) -> None:
        """Wait until a server of the file works, or would with the weights that a resumed run will bring it."""
        deadline = asyncio.get_running_loop().time() + self._settings.start_seconds
        if not self.workers:
            patience = self._settings.start_seconds
            logger.warning(
                "%s names no server yet; waiting up to %.0f s (servers.start_seconds)", self._settings.urls_file, patience
            )
        while not any(worker.works or isinstance(worker.health, Outdated) for worker in self.workers.values()):
            if asyncio.get_running_loop().time() > deadline:
                raise UnsuitableServer(
                    f"No server of {self._settings.urls_file} worked within {self._settings.start_seconds:.0f} s "
                    f"(servers.start_seconds):\n{self.states()}"
                )
            await asyncio.sleep(0.1)

    async def _watch_file(self, path: Path) -> None:
        while True:
            await asyncio.sleep(self._settings.probe_seconds)
            await self._read_file(path)

    async def _read_file(self, path: Path) -> None:
        """Who is new in the file joins, who is no more in it leaves. A file that cannot be read now changes nothing."""
        try:
            urls = read_urls(path.read_text())
        except (OSError, UnicodeDecodeError, ValueError) as error:
            if str(error) != self._misread:  # once, not at each look
                logger.warning("servers.urls_file: %s: %s; the servers stay as they are", path, error)
            self._misread = str(error)
            return
        self._misread = ""
        fixed = {url.rstrip("/") for url in self._settings.urls}
        foreign = {url for url, worker in self.workers.items() if worker.server is None} - fixed
        for url in urls - self.workers.keys():
            self.join(url, path)
        for url in foreign - urls:
            self.leave(url)

"""New weights for all servers, whole or not at all: look, plan, send, name, prove.

    publisher = Publisher(weights, settings, connect, ranks, score)
    report = await publisher.publish(7, [Target("http://127.0.0.1:30000"), …])

Every rank calls `publish` alike; the main rank's targets count. A server that has this version already is passed over, so a
server that comes late, or comes back, gets everything when it is named in a publish of the present version or of the next.
One that fails on the way is put aside and told of in the report, and the others go on. Only a server that took all weights
and then scores otherwise than the policy ends the run: `WrongWeights`, with the first kind of tensor that did not arrive.
"""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import torch

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.publish_settings import PublishSettings
from megatron_rl.weights.publish.crew import Crew, Tell
from megatron_rl.weights.publish.errors import WrongWeights
from megatron_rl.weights.publish.files import choose_folder, is_here, make_folder, own_folders, remove_leftovers
from megatron_rl.weights.publish.gate import Gate, HeldGate, OwnGate
from megatron_rl.weights.publish.plan import Plan, families, plan_files, plan_stream, senders, units
from megatron_rl.weights.publish.ports import Alone, Connect, Halt, PauseMode, Ranks, Server, Target, Weights
from megatron_rl.weights.publish.probe import TOLERANCE, Scores, difference, odd_one_out, probe_sequences, server_scores
from megatron_rl.weights.publish.protocol import UNFINISHED, Delivery
from megatron_rl.weights.publish.report import Outcome, Report, Way
from megatron_rl.weights.publish.stream import send_files, send_stream
from megatron_rl.weights.publish.transports import Broadcast, ByValue, Handles, Transport
from megatron_rl.weights.publish.wire import Quantizer, Wire

Score = Callable[[Sequence[Sequence[int]]], Scores]  # the policy's own, at temperature 1; every rank gets all of them
GLANCE = 30.0  # seconds in which a server must say what it is
NOTICEABLE = 0.05  # share of the probe's difference by which sending a kind of tensor again must change the scores


@dataclass(frozen=True)
class Look:
    """What a server says before a publish."""

    target: Target
    version: int | None = None
    tensor_parallel: int = 1
    failure: str | None = None


@dataclass(frozen=True)
class Shipment:
    """One publish under way on one rank."""

    version: int
    way: Way
    due: Sequence[Look]
    owners: Sequence[int]  # of each due server the rank that sends to it
    crew: Crew
    mine: list[Delivery] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)


PROBE_TOKENS = 64  # of each probe sequence, where nobody said otherwise


class Publisher:
    """Publishes one policy's weights, again and again."""

    def __init__(
        self,
        weights: Weights,
        settings: PublishSettings,
        connect: Connect,
        ranks: Ranks | None = None,
        score: Score | None = None,
        *,
        pause: PauseMode = "abort",
        seconds: float = 3600.0,
        machines: int = 1,
        quantizer: Quantizer | None = None,
        longest: int = PROBE_TOKENS,
        colocated: bool = False,
    ) -> None:
        """`longest` is how many tokens the policy takes, for probes whose length nobody chose. `colocated`: servers use the
        ranks' GPUs, whether or not it is known which of them."""
        self.weights = weights
        self.settings = settings
        self.connect = connect
        self.ranks: Ranks = ranks or Alone()
        self.score = score if settings.probe else None
        self.pause = pause  # what becomes of requests meanwhile
        self.seconds = seconds  # that a server may take for a bucket, or a folder
        self.machines = machines  # that the ranks are spread over
        self.colocated = colocated
        dtype: torch.dtype | None = getattr(torch, settings.dtype) if settings.dtype else None
        self.wire = Wire(weights.weight_map, dtype, quantizer)
        self.version: int | None = None  # of the last publish
        self._kept: Path | None = None  # the files of that version, where they are kept
        self.given: dict[str, int] = {}  # server -> the version that it got from us
        self._units = units(weights.weight_map, weights.dtype)
        vocabulary = weights.weight_map.architecture.vocab
        tokens = settings.probe_tokens or min(PROBE_TOKENS, longest)
        self._sequences = probe_sequences(vocabulary, settings.probe_sequences, tokens)
        if self.ranks.rank == 0:  # now, since a run that has little left to do may publish no more
            remove_leftovers(*([settings.folder] if settings.folder is not None else own_folders()))

    async def publish(
        self, version: int, targets: Sequence[Target], tell: Tell | None = None, halt: Halt | None = None
    ) -> Report:
        """Bring all servers to this version of the weights. The number rises whenever the weights have changed.

        `tell` hears of each bucket that this rank has done with: how many, of how many. `halt`, on the main rank, pauses the
        servers and lets them go on in our stead; it is entered when the first bucket, or all files, are there.
        """
        if version < 0 or (self.version is not None and version < self.version):
            raise ValueError(f"version {version} cannot follow {self.version}: versions count upwards from 0")
        started = time.monotonic()
        crew = Crew(self.weights, self.wire, self.ranks, tell or (lambda done, total: None))
        async with Connections(self.connect) as servers:
            return await self._publish(version, targets, crew, servers, halt, started)

    async def _publish(
        self,
        version: int,
        targets: Sequence[Target],
        crew: Crew,
        servers: "Connections",
        halt: Halt | None,
        started: float,
    ) -> Report:
        looks, here = await self._look(crew, targets, servers)
        held = await crew.alone(self.ranks.from_main, halt is not None)
        due = [look for look in looks if look.failure is None and not self._has(look, version)]
        outcomes = {
            look.target.url: Outcome(look.target.url, "unreachable" if look.failure else "current", look.failure)
            for look in looks
        }
        way = None
        if due:
            way = choose_way(self.settings, self._cuda, here, [look.target for look in due], self.colocated)
            shipment = Shipment(version, way, due, self._owners(way, due), crew)
            async with AsyncExitStack() as stack:
                gate: Gate = OwnGate(version)
                if held:
                    current = {look.target.url for look in looks if look.failure is None and look not in due}
                    gate = await stack.enter_async_context(HeldGate(version, crew, halt, current))
                outcomes |= {outcome.url: outcome for outcome in await self._ship(shipment, servers, gate, here)}
        self.version = version
        self.given |= {url: version for url, outcome in outcomes.items() if outcome.result == "updated"}
        return Report(version, way, self.bytes, time.monotonic() - started, tuple(outcomes.values()))

    @property
    def bytes(self) -> int:
        """Of the weights as the policy holds them."""
        return sum(unit.bytes for unit in self._units)

    def kept(self, version: int) -> Callable[[Server], Awaitable[None]] | None:
        """What brings one paused server to this version without any rank's help: the files, where they are kept."""
        folder = self._kept
        if folder is None:
            return None

        async def load(server: Server) -> None:
            await server.update_from_disk(str(folder), UNFINISHED)
            await server.set_version(version)

        return load

    def forget_files(self) -> None:
        """Remove what was kept of the last publish."""
        if self._kept is not None and self.ranks.rank == 0:
            shutil.rmtree(self._kept, ignore_errors=True)
        self._kept = None

    # -- before --------------------------------------------------------------------------------------------------------

    async def _look(self, crew: Crew, targets: Sequence[Target], servers: "Connections") -> tuple[list[Look], bool]:
        """What the main rank finds out about the servers, and whether everybody is on one machine."""
        looks: list[Look] = []
        here = self.machines == 1
        if self.ranks.rank == 0:
            looks = list(await asyncio.gather(*(_look_at(target, servers) for target in targets)))
            here = here and all(is_here(look.target.url) for look in looks if look.failure is None)
        found: tuple[list[Look], bool] = await crew.alone(self.ranks.from_main, (looks, here))
        return found

    def _has(self, look: Look, version: int) -> bool:
        """Did it get this version from us, and has it not been started anew since?"""
        return not look.target.anew and self.given.get(look.target.url) == version == look.version

    def _owners(self, way: Way, due: Sequence[Look]) -> list[int]:
        if way == "disk":
            return [0] * len(due)  # files need no sender
        if way == "tensor" and self._cuda:
            return [look.target.colocated[0] for look in due]
        return senders(len(due), self.ranks.world_size, self.settings.senders or self.machines)

    @property
    def _cuda(self) -> bool:
        return self.weights.device.type == "cuda"

    # -- under way -----------------------------------------------------------------------------------------------------

    async def _ship(self, shipment: Shipment, servers: "Connections", gate: Gate, here: bool) -> list[Outcome]:
        expected = self.score(self._sequences) if self.score is not None else None
        for look, owner in zip(shipment.due, shipment.owners, strict=True):
            if owner == self.ranks.rank:
                server = await servers.to(look.target.url)
                shipment.mine.append(Delivery(server, look.tensor_parallel, self.pause, self.seconds))
        try:
            await self._send(shipment, gate, here)
            if expected is not None:
                await self._prove(shipment, expected)
        finally:
            await asyncio.gather(*(delivery.settle() for delivery in shipment.mine))
        mine = [delivery.outcome(shipment.differences.get(delivery.url)) for delivery in shipment.mine]
        return [outcome for each in await shipment.crew.alone(self.ranks.everyone_has, mine) for outcome in each]

    async def _send(self, shipment: Shipment, gate: Gate, here: bool) -> None:
        if shipment.way == "disk":
            plan = self._file_plan
            folder = await self._folder(shipment, plan, here)
            try:
                if self.settings.keep_files:
                    self.forget_files()
                    self._kept = folder
                await send_files(shipment.crew, plan, folder, shipment.mine, gate)
            finally:
                if self._kept != folder and self.ranks.rank == 0:  # which alone has told servers to load
                    shutil.rmtree(folder, ignore_errors=True)
            return
        self.forget_files()  # which are of older weights
        receivers = set(shipment.owners)
        if shipment.way == "tensor" and self._cuda:
            receivers = {rank for look in shipment.due for rank in look.target.colocated}
        plan = plan_stream(self._units, self.settings.bucket_bytes, receivers)
        await send_stream(shipment.crew, plan, self._transport(shipment), shipment.mine, gate)

    @cached_property
    def _file_plan(self) -> Plan:
        return plan_files(self._units, self.settings.bucket_bytes, self.weights.shares(), self.ranks.world_size)

    async def _folder(self, shipment: Shipment, plan: Plan, here: bool) -> Path:
        """Made by the main rank; what it cannot do, all ranks raise."""
        found: Path | SettingsError | None = None
        if self.ranks.rank == 0:
            try:
                found = make_folder(choose_folder(self.settings.folder, plan.bytes, here), shipment.version)
            except SettingsError as error:
                found = error
            except OSError as error:
                found = SettingsError(f"publish.folder = {self.settings.folder}: {error}. Name one that can be written to.")
        found = await shipment.crew.alone(self.ranks.from_main, found)
        if isinstance(found, SettingsError):
            raise found
        assert found is not None
        return found

    def _transport(self, shipment: Shipment) -> Transport:
        if shipment.way == "broadcast":
            return Broadcast(self.weights.device, self.seconds)
        if self._cuda:
            return Handles({look.target.url: look.target.colocated for look in shipment.due})
        return ByValue()

    # -- proof ---------------------------------------------------------------------------------------------------------

    @property
    def tolerance(self) -> float:
        if self.settings.tolerance is not None:
            return self.settings.tolerance
        if self.wire.quantizer is not None:
            return TOLERANCE["fp8"]
        narrow = torch.bfloat16 in (self.weights.dtype, self.wire.dtype)
        return TOLERANCE["bfloat16" if narrow else "float32"]

    async def _prove(self, shipment: Shipment, expected: Scores) -> None:
        sums = {}

        async def prove(delivery: Delivery) -> None:
            found = await server_scores(delivery.server, self._sequences)
            shipment.differences[delivery.url] = difference(expected, found)
            sums[delivery.url] = await delivery.server.checksums()

        await asyncio.gather(*(delivery.prove(partial(prove, delivery)) for delivery in shipment.mine))
        told = await shipment.crew.alone(self.ranks.everyone_has, (shipment.differences, sums))
        differences = {url: value for each, _ in told for url, value in each.items()}
        wrong = next((look for look in shipment.due if differences.get(look.target.url, 0.0) > self.tolerance), None)
        odd = odd_one_out({url: tables for _, each in told for url, tables in each.items()})
        reason = await self._explain(shipment, wrong, differences[wrong.target.url]) if wrong is not None else odd
        if reason is not None:
            for delivery in shipment.mine:
                delivery.distrust(reason)
            raise WrongWeights(f"publish of version {shipment.version}: {reason}")
        for delivery in shipment.mine:
            delivery.trust()

    async def _explain(self, shipment: Shipment, wrong: Look, found: float) -> str:
        url = wrong.target.url
        kind = await self._first_wrong(shipment, wrong, found)
        differs = (
            f"{url} took all weights, and its log-probs differ from the policy's by {found:.2g} on average "
            f"(publish.tolerance {self.tolerance:.2g})"
        )
        if kind is not None:
            return f"{differs}. {kind} had not arrived as it was sent: sent again, it changes them. Do not go on with this run."
        return (
            f"{differs}. Every kind of tensor, sent again, changes nothing: it holds what was sent, and computes otherwise. "
            "Compare its --dtype, --quantization and config.json with the policy's."
        )

    async def _first_wrong(self, shipment: Shipment, wrong: Look, found: float) -> str | None:
        """Send the server each kind of tensor again, in the model's order: the first to change its scores had not arrived."""
        owner = shipment.owners[shipment.due.index(wrong)]
        mine = [delivery for delivery in shipment.mine if delivery.url == wrong.target.url]
        crew = replace(shipment.crew, tell=lambda done, total: None)
        scores: list[Scores] = []

        async def score(delivery: Delivery) -> None:
            scores.append(await server_scores(delivery.server, self._sequences))

        for delivery in mine:
            delivery.held = False  # the run ends here: nobody else counts on this server
            await delivery.prove(partial(score, delivery))
        for kind, names in families(self.weights.weight_map).items():
            plan = plan_stream(units(self.weights.weight_map, self.weights.dtype, names), self.settings.bucket_bytes, [owner])
            transport = Broadcast(self.weights.device, self.seconds) if self._cuda else ByValue()
            await send_stream(crew, plan, transport, mine, OwnGate(shipment.version))
            for delivery in mine:
                await delivery.prove(partial(score, delivery))
            changed = any(difference(scores[0], later) > NOTICEABLE * found for later in scores[1:])
            if any(await crew.alone(self.ranks.everyone_has, changed)):
                return kind
        return None


class Connections:
    """Clients that are opened when first needed, and closed together."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._open = AsyncExitStack()
        self._servers: dict[str, Server] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._open.aclose()

    async def to(self, url: str) -> Server:
        if url not in self._servers:
            self._servers[url] = await self._open.enter_async_context(self._connect(url))
        return self._servers[url]


async def _look_at(target: Target, servers: Connections) -> Look:
    try:
        async with asyncio.timeout(GLANCE):
            facts = await (await servers.to(target.url)).server_info()
    except Exception as error:  # it is told of in the report, and left out
        return Look(target, failure=str(error) or repr(error))
    return Look(target, facts.version, facts.tensor_parallel)


def choose_way(settings: PublishSettings, cuda: bool, here: bool, targets: Sequence[Target], colocated: bool = False) -> Way:
    """How weights travel. On GPUs by shared memory where servers sit on the ranks' own GPUs, else by NCCL; on CPUs as files in
    memory where everybody is on one machine, else by gloo: each the fastest of what is possible there. NCCL connects no two
    processes on one GPU: servers that share the ranks' GPUs, nobody knows which, load files."""
    known = all(target.colocated for target in targets)
    if settings.transport == "tensor" and cuda and not known:
        raise SettingsError(
            "publish.transport = tensor on GPUs: servers that do not share the ranks' GPUs cannot see their memory. "
            f"Use publish.transport={'disk' if colocated else 'broadcast'}."
        )
    if settings.transport == "broadcast" and cuda and colocated:
        raise SettingsError(
            "publish.transport = broadcast with servers.placement = colocated: NCCL connects no two processes on one GPU. "
            "Use publish.transport=auto."
        )
    if settings.transport != "auto":
        return settings.transport
    if cuda and known:
        return "tensor"
    if cuda and not colocated:
        return "broadcast"
    return "disk" if cuda or here or settings.folder is not None else "broadcast"

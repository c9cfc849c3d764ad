"""The server on the bench: one that runs, or one started for this; what it is asked, and how weights are sent to it again."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import UserError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.publish_settings import PublishSettings
from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.examine import Hands
from megatron_rl.fidelity.server import Observation, draw, look
from megatron_rl.fidelity.setup import opened_checkpoint, step_of
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.errors import ServerError
from megatron_rl.rollout.keys import api_key
from megatron_rl.rollout.own_servers import own_servers
from megatron_rl.rollout.replies import RoutingShape
from megatron_rl.rollout.server import start_servers, stop_servers
from megatron_rl.weights.checkpoint_files import MANIFEST
from megatron_rl.weights.publish.compare import compare
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.publisher import Publisher
from megatron_rl.weights.publish.stored import StoredWeights
from megatron_rl.weights.publish.wire import fp8_quantizer
from megatron_rl.weights.sources import Source

PROBES, PROBE_TOKENS = 4, 256  # responses that are scored after each part of the weights, and tokens of each

type Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Draws:
    """What the server is asked to sample."""

    prompts: Sequence[Sequence[int]]
    tokens: int  # of each response
    temperature: float


@contextmanager
def bench(settings: Settings, draws: Draws, progress: Progress) -> Iterator[Hands]:
    """A server in our hands: that of servers.urls, or one of our own with the weights of policy.init, which ends with this."""
    architecture = read_architecture(settings.policy.config)
    key = api_key(settings)
    started = asyncio.run(start_servers(own_servers(settings)))
    try:
        url = settings.servers.urls[0].rstrip("/") if settings.servers.urls else started[0].url
        hand = _Hand(url, key, settings, architecture, draws, progress)
        if started:
            asyncio.run(hand.fill())
        yield Hands(lambda: asyncio.run(hand.observe()), lambda observation: asyncio.run(hand.resend(observation)))
    finally:
        asyncio.run(stop_servers(started))


@dataclass(frozen=True)
class _Hand:
    url: str
    key: str | None
    settings: Settings
    architecture: Architecture
    draws: Draws
    progress: Progress

    @property
    def checkpoint(self) -> Path:
        return Path(self.settings.policy.init)

    def client(self, url: str | None = None) -> Client:
        return Client(url or self.url, self.architecture.vocab, self.key)

    async def observe(self) -> Observation:
        async with self.client() as client:
            facts = await look(client)
            vocabulary = await client.vocabulary_size()
            if vocabulary != self.architecture.vocab:
                raise UserError(
                    f"{self.url} serves {facts.model}, whose vocabulary has {vocabulary} tokens; that of {self.checkpoint} has "
                    f"{self.architecture.vocab}. Name a server of the same model."
                )
            shape = _shape(self.architecture) if facts.returns_routing else None
            try:
                drawn = await draw(client, self.draws.prompts, self.draws.tokens, self.draws.temperature, shape)
            except ServerError as error:
                raise UserError(f"the server does not sample what it is asked for: {error}") from error
        return Observation(facts, self.draws.temperature, drawn)

    async def fill(self) -> None:
        """A server that loaded no weights gets a checkpoint's that it could not read by itself."""
        if not (self.checkpoint / MANIFEST).is_file():
            return
        with opened_checkpoint(self.settings) as source:
            report = await self._publisher(source, None).publish(step_of(source) or 0, [Target(self.url)])
        if not report.serving:
            raise UserError(f"the server did not take the weights of {self.checkpoint}: {'; '.join(report.failures)}")

    async def resend(self, observation: Observation) -> Observation:
        """Send the checkpoint's weights part by part, then draw anew."""
        sequences = [each.tokens[:PROBE_TOKENS].tolist() for each in observation.drawn[:PROBES]]
        with opened_checkpoint(self.settings) as source:
            publisher = self._publisher(source, observation)
            step = step_of(source)
            version = step if step is not None else observation.facts.version or 0
            async with self.client() as client:
                parts = await compare(publisher, client, sequences, version, self.progress)
        again = await self.observe()
        return Observation(again.facts, again.temperature, again.drawn, parts)

    def _publisher(self, source: Source, observation: Observation | None) -> Publisher:
        quantization = observation.facts.quantization if observation is not None else None
        quantizer = fp8_quantizer(source.weight_map, quantization)
        settings = PublishSettings(probe=False)
        return Publisher(StoredWeights(source), settings, self.client, pause="retract", quantizer=quantizer)


def _shape(model: Architecture) -> RoutingShape | None:
    experts = model.experts
    return RoutingShape(model.layers, experts.top_k, experts.count) if model.is_moe and experts is not None else None

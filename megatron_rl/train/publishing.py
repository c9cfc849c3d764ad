"""A policy's weights on their way to servers: what ties the policy, the publisher and the servers' pool together."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.settings import Settings
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.slices import model_slices
from megatron_rl.rollout.fleet import UpdateFailed
from megatron_rl.rollout.health import Asleep, Healthy, Outdated, Suspect
from megatron_rl.rollout.pool import Pool
from megatron_rl.types import Sequence as TokenSequence
from megatron_rl.weights.boxes import Slice
from megatron_rl.weights.fp8_audit import audit_layers, served_layers
from megatron_rl.weights.hf_files import read_json
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.crew import Tell
from megatron_rl.weights.publish.live import LiveWeights
from megatron_rl.weights.publish.ports import Connect, Held, Target
from megatron_rl.weights.publish.probe import Scores
from megatron_rl.weights.publish.publisher import Publisher
from megatron_rl.weights.publish.report import Report
from megatron_rl.weights.publish.wire import fp8_quantizer

logger = logging.getLogger(__name__)

Elsewhere = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]


def open_publisher(policy: Policy, connect: Connect, served: Path | None = None) -> Publisher:
    """What publishes a policy's weights, under any layout. Every rank opens it.

    `connect` opens a client for a server's URL: `lambda url: Client(url, policy.architecture.vocab, api_key)`. `served` is the
    folder of the model that the servers were started with, whose config.json says what they take in FP8.
    """
    layout, settings = policy.layout, policy.settings

    def finished_slices() -> Iterator[Slice]:
        policy.optimizer.gather_weights()
        return model_slices(policy.model, layout)

    weight_map = WeightMap(policy.architecture)
    weights = LiveWeights(
        weight_map,
        settings.layout,
        layout.world_size,
        finished_slices,
        policy.model.config.params_dtype,
        layout.device.torch_device,
    )
    quantization = read_json(served / "config.json").get("quantization_config") if served is not None else None
    return Publisher(
        weights,
        settings.publish,
        connect,
        layout,
        lambda sequences: score(policy, sequences),
        pause=settings.servers.update,
        seconds=settings.servers.update_seconds,
        machines=-(-layout.world_size // layout.launch.local_world_size),
        quantizer=fp8_quantizer(weight_map, quantization),
        longest=settings.batch.max_sequence or settings.batch.max_tokens,
        colocated=settings.servers.colocated,
    )


def require_same_layers(settings: Settings, architecture: Architecture, served: Path | None) -> None:
    """Where trainer and servers both compute in FP8, they round the same layers by the same scales; else SettingsError.

    `served`: the folder of the model that servers are started with. Asked before anything is loaded. One side alone in FP8 is
    a choice, and a warning.
    """
    quantization = read_json(served / "config.json").get("quantization_config") if served is not None else None
    weight_map = WeightMap(architecture)
    layers = served_layers(weight_map, quantization, settings.sglang.get("quantization"))
    audit = audit_layers(weight_map, settings.precision, layers, exports=settings.checkpoint.export_dtype == "fp8")
    audit.require()
    for remark in audit.remarks if layers else ():
        logger.warning("%s: expect a mismatch of log-probs, and see docs/fidelity.md", remark)


async def publish_to_pool(
    publisher: Publisher, version: int, pool: Pool | None, tell: Tell | None = None, on_pool: Elsewhere | None = None
) -> Report:
    """Bring all servers of a pool to this version; the pool pauses them, takes failures, and lets the others go on.

    Should none take it, none works until another publish of this version, or of a later one, has reached it. Every rank calls
    it, the main one with the pool. `on_pool` waits for a coroutine on the pool's own event loop, if that is not the one
    where this runs.
    """
    if pool is None:
        return await publisher.publish(version, [], tell)
    fleet, wait = pool.fleet, on_pool or _here

    @asynccontextmanager
    async def halt() -> AsyncIterator[Held]:
        paused = fleet.paused(version, publisher.kept(version))
        update = await wait(paused.__aenter__())
        clients = {client.url: client for client in update.clients}
        try:
            yield Held(tuple(clients), lambda url, reason: update.drop(clients[url], reason))
        except BaseException as error:
            await wait(paused.__aexit__(type(error), error, error.__traceback__))
            raise
        with suppress(UpdateFailed):  # the report tells of it
            await wait(paused.__aexit__(None, None, None))

    known = tuple(fleet.workers.values())  # at once: in the thread that they live in some may come or go
    present = [worker for worker in known if isinstance(worker.health, Healthy | Suspect | Outdated | Asleep)]
    targets = [Target(worker.url, worker.server.options.ranks if worker.server else (), anew=worker.torn) for worker in present]
    report = await publisher.publish(version, targets, tell, halt)
    if not report.serving:
        told = "".join(f"\n  {failure}" for failure in report.failures)
        logger.warning("no server has weights %d yet; they get them when they are back%s", version, told)
        await wait(fleet.expect(version))
    return report


async def _here(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return await coroutine


def score(policy: Policy, sequences: Sequence[Sequence[int]]) -> Scores:
    """Log-probs of given tokens at temperature 1, token-aligned, the same on every rank."""
    given = [
        TokenSequence(index, np.asarray(tokens, np.int64), np.zeros(len(tokens), np.bool_))
        for index, tokens in enumerate(sequences)
    ]
    packs = policy.pack(given)
    values = policy.log_probs(packs, everywhere=True, temperature=1.0)
    own = policy.per_sequence(packs, [each.log_probs for each in values])
    found = {index: array for each in policy.layout.everyone_has(own) for index, array in each.items()}
    return [found[index] for index in range(len(given))]

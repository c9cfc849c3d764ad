"""A policy and an SGLang server on one GPU, in turns: memory, weights, and how far they agree."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from megatron_rl.config.settings import Settings
from megatron_rl.data.toy_tokenizer import SIZE, write_toy_tokenizer
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.own_servers import own_servers, require_ranks
from megatron_rl.rollout.server import Server, start_servers
from megatron_rl.train.publishing import open_publisher
from megatron_rl.train.run import train
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.publisher import Publisher
from tools.gpu_acceptance.child import Task
from tools.gpu_acceptance.models import middle, opened, precision, require_recipe, settings_of
from tools.gpu_acceptance.results import Finding
from tools.toy_runs import Told

GIB = 2**30
ROUNDS, SMOKE_ROUNDS = 5, 2  # timed publishes, after one that is not
COLOCATED = {"placement": "colocated", "count": 1, "start_seconds": 420.0}


# -- memory and weights ----------------------------------------------------------------------------------------------------


def colocated(task: Task) -> Iterator[Finding]:
    """A policy, then a server on what it has left: asleep, awake, and given weights again and again."""
    settings = settings_of(
        middle(task.smoke),
        task.scratch,
        servers=COLOCATED,
        sglang={"skip_tokenizer_init": True},
        publish={"probe_sequences": 2},
    )
    with opened(settings) as policy:
        policy.make_room()
        options = own_servers(settings)
        require_ranks(options, local_ranks=1)
        began = time.perf_counter()
        (server,) = asyncio.run(start_servers(options))
        with server:
            yield Finding("start of a server", time.perf_counter() - began, "s")
            yield from asyncio.run(_all(_served(task, policy, server)))


async def _all(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]


async def _served(task: Task, policy: Policy, server: Server) -> AsyncIterator[Finding]:
    async with Client(server.url, policy.architecture.vocab, server.options.api_key) as client:
        async for finding in _turns(client, policy.layout.device.cuda):
            yield finding
        async for finding in _published(task, policy, client, Target(server.url, server.options.ranks)):
            yield finding
        response = await client.generate([1, 2, 3], Sampling(8, ignore_end=True))
        yield Finding("tokens after all that", float(len(response.tokens)), note=f"by weights {response.spans[-1].version}")


async def _turns(client: Client, cuda: bool) -> AsyncIterator[Finding]:
    """The server gives its memory back, and takes it again."""
    awake, began = free_memory(cuda), time.perf_counter()
    await client.sleep()
    slept, asleep = time.perf_counter() - began, free_memory(cuda)
    began = time.perf_counter()
    await client.wake()
    woken, again = time.perf_counter() - began, free_memory(cuda)
    yield Finding("lying down", slept, "s")
    yield Finding("waking", woken, "s")
    if awake is None or asleep is None or again is None:
        yield Finding("memory given back", "nothing: a server on a CPU keeps it")
        return
    yield Finding("free beside an awake server", awake, "GiB")
    yield Finding("memory given back", asleep - awake, "GiB")
    yield Finding("memory taken again", asleep - again, "GiB")


def free_memory(cuda: bool) -> float | None:
    """GiB of the GPU that nobody has, whichever process."""
    return torch.cuda.mem_get_info()[0] / GIB if cuda else None


async def _published(task: Task, policy: Policy, client: Client, target: Target) -> AsyncIterator[Finding]:
    """Weights whole, again and again without a look at what arrived, and a last time with one."""
    quiet = _publisher(policy, client, probe=False)
    seconds, paused, report = [], [], await quiet.publish(1, [target])
    for version in range(2, 2 + (SMOKE_ROUNDS if task.smoke else ROUNDS)):
        report = await quiet.publish(version, [target])
        if report.serving != (target.url,):
            raise RuntimeError(f"weights {version} did not arrive: {', '.join(report.failures)}")
        seconds.append(report.seconds)
        paused.append(report.outcomes[0].paused)
    yield Finding("way of the weights", str(report.way), note="tensor: CUDA IPC, handles of memory on the GPU that both see")
    yield Finding("weights", report.bytes / 1e6, "MB")
    yield Finding("publish", report.bytes / 1e6 / statistics.median(seconds), "MB/s", series=tuple(seconds))
    yield Finding("the server stands still for", statistics.median(paused), "s", series=tuple(paused))
    proving = _publisher(policy, client, probe=True)
    (outcome,) = (await proving.publish(report.version + 1, [target])).outcomes
    if outcome.difference is None:
        raise RuntimeError(f"the publish with a probe ended {outcome.result}: {outcome.failure}")
    told = "nats, mean |Δ log-prob| of the sequence that differs most"
    yield Finding("server beside policy", outcome.difference, told, proving.tolerance)


def _publisher(policy: Policy, client: Client, *, probe: bool) -> Publisher:
    settings = policy.settings
    policy.settings = settings.model_copy(update={"publish": settings.publish.model_copy(update={"probe": probe})})
    try:
        return open_publisher(policy, lambda url: nullcontext(client))
    finally:
        policy.settings = settings


# -- mismatch --------------------------------------------------------------------------------------------------------------


def mismatch(task: Task) -> Iterator[Finding]:
    """A step of a real run on one GPU: sampled by a server, scored by the policy, which repeats its routing (R3). The same
    samples scored again by a policy whose routers choose for themselves."""
    require_recipe(_run(task, "rollout"))
    replayed = _trained(_run(task, "rollout"))
    yield from _of_the_run(replayed)
    live = _trained(_run(task, "off", {"replay": task.scratch / "rollout" / "bank"}))
    for name, metrics in (("without replay", live), ("with R3", replayed)):
        yield Finding(f"KL of server and policy, {name}", metrics["mismatch_k3"], "nats a token, k3")
        yield Finding(f"largest |Δ log-prob|, {name}", metrics["mismatch_max"], "nats")
    yield Finding("KL with R3 over without", replayed["mismatch_k3"] / live["mismatch_k3"], "times")


def _of_the_run(metrics: Mapping[str, float]) -> Iterator[Finding]:
    yield Finding("samples without the server's routing", metrics["replay/missing"], "", 0.0)
    yield Finding("routed otherwise by the policy", metrics["replay/rollout_differs"], "of tokens x layers")
    yield Finding("response", metrics["response/tokens"], "tokens, mean")
    yield Finding("lying down", metrics["seconds/sleep"], "s")


def _run(task: Task, replay: str, bank: Mapping[str, Any] | None = None) -> Settings:
    """One step, on a toy's tokens: there is no tokenizer to download. Only what the server keeps (`rollout`) is sampled."""
    shape = replace(middle(task.smoke), vocabulary=SIZE)
    settings = settings_of(
        shape,
        task.scratch,
        precision=precision(task.variant),
        objective={"routing_replay": replay},
        data={"sources": [{"path": "task:arithmetic"}]},
        rewards=[{"name": "length", "options": {"high": 32}}],
        sampling={"groups": 2 if task.smoke else 16, "group_size": 4, "max_new_tokens": 12 if task.smoke else 512},
        servers={} if bank else COLOCATED,
        bank=dict(bank or {}),
        observe={"look_every": 0},
        run={"directory": task.scratch / replay, "steps": 1},
    )
    write_toy_tokenizer(settings.policy.config)
    return settings


def _trained(settings: Settings) -> Mapping[str, float]:
    """What the run tells of its one step."""
    told = Told(lambda: None)
    train(settings, observers=[told])
    (metrics,) = told.steps
    return metrics

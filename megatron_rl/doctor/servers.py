"""Servers that are named: there, fit for this run, of the pinned version, and able to generate."""

import asyncio
import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from megatron_rl.config.errors import UserError
from megatron_rl.config.rules.case import counted
from megatron_rl.config.settings import Settings
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.connection import Patience
from megatron_rl.rollout.errors import ServerError
from megatron_rl.rollout.keys import NOT_MADE, given_key
from megatron_rl.rollout.own_servers import own_servers
from megatron_rl.rollout.suitability import Demands, shortcomings
from megatron_rl.rollout.urls_file import read_urls

START = "Start servers with `megatron-rl serve`, or correct servers.urls, servers.urls_file or --server."
TOKENS = 8  # of the response that is asked for
ANSWER = 10.0  # seconds that a server may take to answer a question
SILENCE = 60.0  # seconds without a token; one that is paused or asleep brings none


def check_servers(visit: Visit) -> Iterator[Finding]:
    """A real response of each, unless steps are left out. Own servers do not run yet: what they would be started with."""
    urls, key = list(visit.urls), None
    settings, named = visit.settings, list[str]()
    if settings is not None:
        key = given_key(settings)
        urls += [url for url in settings.servers.urls if url not in urls]
        if settings.servers.urls_file is not None:
            try:
                named = _named(settings.servers.urls_file)
            except (OSError, ValueError) as fault:  # also what is no text
                yield error(f"the file of URLs cannot be read: {fault}", str(settings.servers.urls_file), START)
            else:
                if not named:
                    yield _nobody(settings)
            urls += [url for url in named if url not in urls]
        own = own_servers(settings, key or NOT_MADE)  # making one is the run's
        if own:
            yield well(f"the run starts {counted(len(own), 'server')} of {own[0].model} itself", visit.named)
    elif not urls:
        yield well("no server is named", "")
    yield from asyncio.run(_ask_all(visit, {url: _fix(settings) if url in named else START for url in urls}, key))


def _fix(settings: Settings | None) -> str:
    """Of a server that the file of URLs names, and that does not serve."""
    file = settings and settings.servers.urls_file
    return f"If the job that wrote it into {file} is gone (killed with -9 it takes nothing out), remove the line. {START}"


def _nobody(settings: Settings) -> Finding:
    """The file of URLs is empty, or not there yet."""
    place, nodes = str(settings.servers.urls_file), settings.cluster.server_nodes
    if nodes:
        where = f"on {counted(nodes, 'machine')} (cluster.server_nodes)"
        return well(f"no server yet: they are started with the run, {where}", place)
    return error("the file of URLs names no server", place, START)


async def _ask_all(visit: Visit, urls: Mapping[str, str], key: str | None) -> list[Finding]:
    """`urls` with what to do about one that does not serve."""
    return list(await asyncio.gather(*(_ask(visit, url, fix, key) for url, fix in urls.items())))


async def _ask(visit: Visit, url: str, fix: str, key: str | None) -> Finding:
    patience = Patience(answer=ANSWER, silence=min(SILENCE, visit.seconds), update=ANSWER)
    try:
        async with Client(url, 1, key, patience) as stranger:
            family, size = (await stranger.model_info()).family, await stranger.vocabulary_size()
        async with Client(url, size, key, patience) as client:
            return await _look_at(visit, client, family or "")
    except (UserError, ServerError) as fault:
        return error(f"a server does not serve this run: {fault}", url, fix)


async def _look_at(visit: Visit, client: Client, family: str) -> Finding:
    """Nothing is changed there: a server that is paused or asleep may be another run's."""
    settings, model = visit.settings, visit.architecture
    demands = Demands(family, client.vocabulary)
    if settings is not None and model is not None:
        longest = settings.sampling.max_tokens or settings.batch.max_sequence or settings.batch.max_tokens
        demands = Demands.of(model, routing=settings.keeps_routing, longest=longest, sleeps=settings.servers.colocated)
    info = await client.server_info()
    problems = shortcomings(info, demands)
    if (family, client.vocabulary) != (demands.family, demands.vocabulary):
        problems.append(
            f"it serves a {family} model of {client.vocabulary} tokens ({info.model}); the policy is a {demands.family} of "
            f"{demands.vocabulary}"
        )
    if problems:
        return error(f"a server does not serve this run: {'; '.join(problems)}", client.url, START)
    told = f"SGLang {info.sglang} serves a {family} model, weights {info.version}"
    if visit.step:
        response = await client.generate([1, 2, 3], Sampling(TOKENS, ignore_end=True))
        if len(response.tokens) != TOKENS or not all(map(math.isfinite, response.log_probs)):
            return error(
                f"{told}, and generates {len(response.tokens)} of {TOKENS} tokens, or log-probabilities that are no numbers",
                client.url,
                "Start it with --dtype bfloat16, and look at the weights that it has loaded.",
            )
        told = f"{told}; it has generated {TOKENS} tokens"
    pinned = metadata.version("sglang") if _installed() else None
    if pinned is not None and info.sglang != pinned:
        return warning(f"{told}; here SGLang is {pinned}", client.url, "Use one version everywhere: launch/setup.sh there too.")
    return well(told, client.url)


def _installed() -> bool:
    return any(metadata.distributions(name="sglang"))


def _named(path: Path) -> list[str]:
    """A file that is not there yet names nobody: its servers may still start."""
    return sorted(read_urls(path.read_text(encoding="utf-8"))) if path.exists() else []

"""Rules about the servers that sample. They look at settings alone: `megatron-rl serve` asks them without a model."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_rl.config.rules.case import Case, Rule, problem
from megatron_rl.config.rules.placement import placement_problems
from megatron_rl.config.settings import Settings
from megatron_rl.config.sglang_arguments import check_arguments


def server_problems(settings: Settings) -> Iterator[str]:
    """Whatever is wrong with the sections `servers` and `sglang`."""
    yield from check_arguments(settings.sglang)
    yield from _urls_are_urls(settings)
    yield from _somebody_samples(settings)
    yield from _a_router_passes_everything_on(settings)
    yield from placement_problems(settings)


def servers_can_work(case: Case) -> Iterator[str]:
    yield from server_problems(case.settings)


def _urls_are_urls(settings: Settings) -> Iterator[str]:
    named = {f"servers.urls[{index}]": url for index, url in enumerate(settings.servers.urls)}
    for name, url in {**named, "servers.router": settings.servers.router}.items():
        parts = urlsplit(url or "http://none")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield problem(f"{name} = {url}", "this is no URL of a server", "Write it as http://host:port")


def _somebody_samples(settings: Settings) -> Iterator[str]:
    servers = settings.servers
    if servers.count == 0 and not servers.urls and servers.urls_file is None:
        yield problem(
            "servers.count = 0 without servers.urls and servers.urls_file",
            "nobody would sample",
            "Set servers.count to at least 1, or name servers in servers.urls",
        )


def _a_router_passes_everything_on(settings: Settings) -> Iterator[str]:
    servers = settings.servers
    if servers.router is not None and servers.update != "abort":
        yield problem(
            f"servers.router = {servers.router} with servers.update = {servers.update}",
            "behind a router it is not known which server has a response, so none can be waited for while it is paused",
            "Set servers.update=abort, or remove servers.router",
        )


RULES: tuple[Rule, ...] = (servers_can_work,)

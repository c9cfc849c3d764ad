"""Rules about the servers that sample."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_rl.config.rules.case import Case, Rule, problem
from megatron_rl.config.sglang_arguments import check_arguments


def server_arguments_exist(case: Case) -> Iterator[str]:
    yield from check_arguments(case.settings.sglang)


def server_urls_are_urls(case: Case) -> Iterator[str]:
    servers = case.settings.servers
    named = {f"servers.urls[{index}]": url for index, url in enumerate(servers.urls)}
    for name, url in {**named, "servers.router": servers.router}.items():
        parts = urlsplit(url or "http://none")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield problem(f"{name} = {url}", "this is no URL of a server", "Write it as http://host:port")


def some_server_samples(case: Case) -> Iterator[str]:
    servers = case.settings.servers
    if servers.count == 0 and not servers.urls and servers.urls_file is None:
        yield problem(
            "servers.count = 0 without servers.urls and servers.urls_file",
            "nobody would sample",
            "Set servers.count to at least 1, or name servers in servers.urls",
        )


def servers_off_this_machine_have_a_key(case: Case) -> Iterator[str]:
    servers = case.settings.servers
    if servers.host not in ("127.0.0.1", "localhost", "::1") and servers.api_key_file is None:
        yield problem(
            f"servers.host = {servers.host} without servers.api_key_file",
            "whoever reaches this address could change the weights and read every prompt",
            "Set servers.api_key_file, or servers.host=127.0.0.1",
        )


RULES: tuple[Rule, ...] = (
    server_arguments_exist,
    server_urls_are_urls,
    some_server_samples,
    servers_off_this_machine_have_a_key,
)

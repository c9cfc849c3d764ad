"""Servers that run until they are told to end: what `megatron-rl serve` does."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rl.rollout.server import Server, ServerOptions, ServerStartError, start_again, start_servers, stop_servers
from megatron_rl.rollout.told import until_told
from megatron_rl.rollout.urls_file import announced

GLANCE = 1.0  # seconds between looks at whether all still run


async def serve(
    options: Sequence[ServerOptions],
    urls_file: Path,
    restarts: int,
    ready: Callable[[Sequence[Server]], None],
    say: Callable[[str], None],
) -> None:
    """Start servers, write their URLs into the file, call `ready`, and keep them until SIGINT or SIGTERM.

    A server that ends by itself is started again, `restarts` times each; one too many ends all.
    """
    with until_told():
        servers: list[Server] = []
        try:
            servers = await start_servers(options)
            with announced(urls_file, [server.url for server in servers]):
                ready(servers)
                await _keep(servers, restarts, say)
        except asyncio.CancelledError:
            say("ending the servers")
        finally:
            await stop_servers(servers)


async def _keep(servers: list[Server], restarts: int, say: Callable[[str], None]) -> None:
    """Start again what ended, at the address it had."""
    left = [restarts] * len(servers)
    while True:
        await asyncio.sleep(GLANCE)
        for index, server in enumerate(servers):
            if server.alive:
                continue
            if left[index] == 0:
                raise ServerStartError(
                    f"The SGLang server at {server.url} ended, and may not be started again (servers.restarts = {restarts}). "
                    f"Its last words are in {server.options.log}."
                )
            left[index] -= 1
            say(f"the server at {server.url} ended; it is started again")
            servers[index] = await start_again(server)
            await servers[index].ready()
            say(f"the server at {server.url} is back")

"""Servers that a file of URLs names: told with the file where nobody answers, and with the key's where that is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from megatron_rl.config.load import load_settings
from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.keys import api_key
from megatron_rl.rollout.server import free_ports
from megatron_rl.rollout.suitability import Demands, UnsuitableServer

DEMANDS = Demands(family="any", vocabulary=8)


@asynccontextmanager
async def closed_door() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Somebody who answers nobody, and what was shown to them."""
    shown: list[bytes] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shown.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", shown


async def begun(settings: ServerSettings, key: Callable[[], str | None]) -> str:
    """What is said of the servers when none has come to work."""
    fleet = Fleet(settings, DEMANDS, key, 0, lambda: None)
    async with asyncio.timeout(30):
        with pytest.raises(UnsuitableServer) as error:
            await fleet.begin([])
    return str(error.value)


def of(folder: Path) -> ServerSettings:
    return ServerSettings(urls_file=folder / "urls", start_seconds=0.5, probe_seconds=0.05)


def test_a_url_that_nobody_took_out_is_told_with_its_file(tmp_path: Path) -> None:
    """And one of servers.urls is not: no file is to be mended for it."""
    dead, named = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    (tmp_path / "urls").write_text(f"{dead}\n")
    said = asyncio.run(begun(of(tmp_path), lambda: None))
    assert f"{dead}/" in said and "no connection (Connection refused)" in said
    assert f"Its URL is in {tmp_path / 'urls'}: the job that wrote it there may be gone" in said
    said = asyncio.run(begun(ServerSettings(urls=(named,)), lambda: None))
    assert "Correct servers.urls" in said and "may be gone" not in said


@pytest.mark.parametrize("there", [False, True], ids=["before its time", "of other servers"])
def test_a_refused_key_is_told_with_its_file_and_read_again(tmp_path: Path, there: bool) -> None:
    settings = load_settings(None, ["policy.init=m", f"servers.urls_file={tmp_path / 'urls'}"])
    key = tmp_path / "urls.key"
    if there:
        key.write_text("first\n")

    async def run() -> tuple[str, list[bytes]]:
        async with closed_door() as (url, shown):
            (tmp_path / "urls").write_text(f"{url}\n")
            waiting = asyncio.create_task(begun(of(tmp_path), lambda: api_key(settings)))
            async with asyncio.timeout(30):
                while not shown:
                    await asyncio.sleep(0.01)
                key.write_text("second\n")
                said = await waiting
            return said, shown

    said, shown = asyncio.run(run())
    assert "HTTP 401" in said and f"Its key was looked for in {key}, and is another" in said
    assert (b"Bearer first" in shown[0]) == there and b"Bearer second" in shown[-1]


def test_a_key_that_is_not_there_yet_is_said_to_be_missing(tmp_path: Path) -> None:
    async def run() -> str:
        async with closed_door() as (url, _):
            (tmp_path / "urls").write_text(f"{url}\n")
            return await begun(of(tmp_path), lambda: None)

    assert f"Its key was looked for in {tmp_path / 'urls.key'}, which is not there yet" in asyncio.run(run())

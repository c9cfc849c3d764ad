"""A stream of events as it comes from the network: in pieces of any size, with anything in them that a model can say."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.errors import SettingsError
from megatron_rl.rollout.connection import Connection, Patience, split_lines
from megatron_rl.rollout.errors import BadReply, NoKey, Refused, ServerError, Unreachable

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
SAID = "one\u2028two\x85three\x0bfour\x1efive\rsix\x0cseven"  # nothing here ends a line of the stream


@given(st.lists(st.binary(max_size=6).filter(lambda line: b"\n" not in line), min_size=1), st.lists(st.integers(0, 40)))
def test_lines_are_the_same_wherever_the_network_cuts(lines: list[bytes], cuts: list[int]) -> None:
    stream = b"\n".join(lines)

    async def chunks() -> AsyncIterator[bytes]:
        ends = sorted(cut for cut in cuts if cut < len(stream))
        for start, end in zip([0, *ends], [*ends, len(stream)], strict=True):
            yield stream[start:end]

    async def read() -> list[bytes]:
        return [line async for line in split_lines(chunks())]

    assert asyncio.run(read()) == lines


async def events(answer: bytes, head: bytes = OK) -> list[object]:
    """What is read from a server that answers so to every request."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head + answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        connection = Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, Patience())
        try:
            return [event async for event in connection.events("/generate", {})]
        finally:
            await connection.close()


def test_an_event_holds_whatever_a_model_says() -> None:
    said = [{"text": SAID}, {"text": "\n"}]
    stream = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in said) + "data: [DONE]\n\n"
    assert asyncio.run(events(stream.encode())) == said


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (b'data: {"text": "a"}\n\n', "the stream was cut short"),
        (b'data: {"text": "a\n\n', "not JSON"),
        (b'data: {"text": "\xff"}\n\n', "not JSON"),
        (b"data: 3\n\n", "a JSON object was expected"),
        (b"event: a\n\n", "a line that is no event"),
    ],
)
def test_streams_that_cannot_be_trusted(stream: bytes, said: str) -> None:
    with pytest.raises(BadReply, match=said):
        asyncio.run(events(stream))


@pytest.mark.parametrize(
    ("stream", "error", "said"),
    [
        (b"", Unreachable, "/generate: "),
        (b"SMTP ready\r\n\r\n", BadReply, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ndata: [DONE]\n\n", BadReply, "cut short"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\ndata: {", BadReply, "cut short"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n", Refused, "HTTP 302"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno", Refused, "no. Give the server's API key"),
    ],
    ids=["hung up", "not http", "half a body", "half a chunk", "elsewhere", "no key"],
)
def test_servers_that_break_off(stream: bytes, error: type[ServerError], said: str) -> None:
    with pytest.raises(error, match=said):
        asyncio.run(events(stream, head=b""))


def test_requests_share_a_connection_when_a_stream_was_read_to_its_end() -> None:
    """And one that is left early is closed: at that the server aborts its request."""
    came: list[asyncio.StreamWriter] = []
    left = asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer)
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                await reader.readuntil(b"\r\n\r\n{}")
                for said in (b'data: {"a": 1}\n\n', b'data: {"a": 2}\n\n', b"data: [DONE]\n\n"):
                    writer.write(head + b"%x\r\n%s\r\n" % (len(said), said))
                    head = b""
                    await asyncio.sleep(0)
                writer.write(b"0\r\n\r\n")
                head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        left.set()
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            connection = Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, Patience())
            for _ in range(3):
                assert [event async for event in connection.events("/generate", {})] == [{"a": 1}, {"a": 2}]
            assert len(came) == 1 and not left.is_set()
            async with contextlib.aclosing(connection.events("/generate", {})) as early:
                assert await anext(early) == {"a": 1}
            async with asyncio.timeout(10):
                await left.wait()
            await connection.close()

    asyncio.run(ask())


def test_a_key_that_comes_later_is_found() -> None:
    """Looked for with the first request, with the next after a refusal, and not with each."""
    found: list[str | None] = [None, "old", "new"]
    shown = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        shown.append(next((line[7:] for line in head.decode().split("\r\nAuthorization: ")[1:]), "").partition("\r")[0])
        status = b"200 OK" if shown[-1] == "new" else b"401 Unauthorized"
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            connection = Connection(url, lambda: found.pop(0), Patience())
            for _ in range(2):
                with pytest.raises(Refused, match=r"Give the server's API key"):
                    await connection.ask("/server_info")
            for _ in range(3):
                assert await connection.ask("/server_info") == {}
            await connection.close()

    asyncio.run(ask())
    assert shown == ["", "old", "new", "new", "new"]


def test_a_key_that_cannot_be_read_is_an_error_of_its_server() -> None:
    def unreadable() -> str:
        raise SettingsError("urls.key: it cannot be read")

    async def ask() -> None:
        connection = Connection("http://127.0.0.1:9", unreadable, Patience())
        with pytest.raises(NoKey, match=r"127\.0\.0\.1:9/server_info: urls\.key: it cannot be read"):
            await connection.ask("/server_info")
        await connection.close()

    asyncio.run(ask())


def test_a_call_is_not_lost_on_a_connection_that_was_cut_meanwhile() -> None:
    """Each has one of its own: what ends behind an answer costs no other call."""
    came = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            connection = Connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, Patience())
            for _ in range(20):
                assert await connection.ask("/get_model_info") == {}
            await connection.close()
            assert len(came) == 20

    asyncio.run(ask())

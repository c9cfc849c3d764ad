"""A stream of events as it comes from the network: in pieces of any size, with anything in them that a model can say."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rollout.connection import Connection, Patience, split_lines
from megatron_rl.rollout.errors import BadReply

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


async def events(answer: bytes) -> list[object]:
    """What is read from a server that answers so to every request."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + answer)
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

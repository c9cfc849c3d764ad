"""HTTP to one server: requests, streams, and what goes wrong on the way as our own errors."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_rl.rollout.errors import BadReply, Refused, TimedOut, Unreachable
from megatron_rl.rollout.replies import Untrusted

DATA, DONE = b"data:", b"[DONE]"  # of server-sent events
SHOWN = 200  # characters of a reply that an error shows


@dataclass(frozen=True)
class Patience:
    """How long a server may take, in seconds."""

    connect: float = 10.0
    answer: float = 60.0  # a question or a control call
    silence: float = 300.0  # between two pieces of a response, and before the first
    update: float = 3600.0  # new weights, memory


class Connection:
    """All requests to one server; as many at a time as there are callers."""

    def __init__(self, url: str, api_key: str | None, patience: Patience) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self._held = False
        self._unhurried = httpx.Timeout(None, connect=patience.connect)  # a stream is timed by what it says
        self._silences: set[asyncio.Timeout] = set()  # of the streams that run
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(patience.answer, connect=patience.connect, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy of the environment would sit between us and the next machine, and cut streams short
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, endpoint: str) -> Mapping[str, Any]:
        """GET a JSON object."""
        return self._object(endpoint, await self._send("GET", endpoint, None, self.patience.answer))

    async def call(self, endpoint: str, body: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        """POST, and get a JSON object."""
        return self._object(endpoint, await self._send("POST", endpoint, body, seconds))

    async def tell(self, endpoint: str, body: Mapping[str, Any] | None, seconds: float) -> None:
        """POST where the answer says nothing but whether it went well."""
        await self._send("POST", endpoint, body, seconds)

    async def status(self, endpoint: str) -> int:
        """The status of a GET, whatever it is."""
        with self._mapping(endpoint):
            return (await self._http.get(endpoint)).status_code

    async def events(self, endpoint: str, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any]]:
        """The events of a stream until its end mark. A silence too long is TimedOut, an end without the mark BadReply.

        Leaving early closes the connection, at which the server aborts the request.
        """
        request = self._http.build_request("POST", endpoint, json=body, timeout=self._unhurried)
        with self._mapping(endpoint):
            async with self._listening():
                response = await self._http.send(request, stream=True)
            try:
                if response.status_code != httpx.codes.OK:
                    async with self._listening():
                        await response.aread()
                    self._refuse(endpoint, response)
                lines = split_lines(response.aiter_bytes())
                while True:
                    async with self._listening():
                        line = await anext(lines, None)
                    if line is None:
                        raise BadReply(self.url, endpoint, "the stream was cut short")
                    if line.strip():
                        event = self._event(endpoint, line)
                        if event is None:
                            return
                        yield event
            finally:
                await response.aclose()

    def hold(self) -> None:
        """The server pauses: silence is to be expected."""
        self._held = True
        for silence in self._silences:
            silence.reschedule(None)

    def release(self) -> None:
        """The server generates again: silence counts from now."""
        self._held = False
        for silence in self._silences:
            silence.reschedule(self._deadline())

    @contextlib.contextmanager
    def trusting(self, endpoint: str) -> Iterator[None]:
        """What is read in here comes from this endpoint."""
        try:
            yield
        except Untrusted as error:
            raise BadReply(self.url, endpoint, str(error)) from error

    async def _send(self, method: str, endpoint: str, body: Mapping[str, Any] | None, seconds: float) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=self.patience.connect, pool=None)
        with self._mapping(endpoint):
            response = await self._http.request(method, endpoint, json=body, timeout=timeout)
        if response.status_code != httpx.codes.OK:
            self._refuse(endpoint, response)
        return response

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """As long as a silence may be; while the server is held, as long as it takes."""
        async with asyncio.timeout_at(self._deadline()) as silence:
            self._silences.add(silence)
            try:
                yield
            finally:
                self._silences.discard(silence)

    def _deadline(self) -> float | None:
        return None if self._held else asyncio.get_running_loop().time() + self.patience.silence

    def _event(self, endpoint: str, line: bytes) -> Mapping[str, Any] | None:
        """The event of a line; None for the end mark. An event may be the server's refusal."""
        if not line.startswith(DATA):
            raise BadReply(self.url, endpoint, f"the stream has a line that is no event: {line[:SHOWN]!r}")
        text = line.removeprefix(DATA).strip()
        if text == DONE:
            return None
        event = self._json(endpoint, text)
        if "error" in event:
            error = event["error"] if isinstance(event["error"], dict) else {}
            code = error.get("code")
            status = code if isinstance(code, int) else httpx.codes.INTERNAL_SERVER_ERROR
            raise Refused(self.url, endpoint, str(error.get("message", event["error"]))[:SHOWN], status)
        return event

    def _object(self, endpoint: str, response: httpx.Response) -> Mapping[str, Any]:
        return self._json(endpoint, response.content)

    def _json(self, endpoint: str, text: bytes) -> Mapping[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise BadReply(self.url, endpoint, f"not JSON ({error}): {text[:SHOWN]!r}") from error
        if not isinstance(value, dict):
            raise BadReply(self.url, endpoint, f"a JSON object was expected: {text[:SHOWN]!r}")
        return value

    def _refuse(self, endpoint: str, response: httpx.Response) -> None:
        """Raise what an answer other than 200 says, in the server's own words where it has some."""
        words = response.text.strip()
        with contextlib.suppress(ValueError):
            told = json.loads(words)
            if isinstance(told, dict):
                error = told.get("error", told.get("message", told.get("detail", words)))
                words = str(error.get("message", error) if isinstance(error, dict) else error)
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            words = f"{words}. Give the server's API key (servers.api_key_file)"
        raise Refused(self.url, endpoint, words[:SHOWN] or "refused without a word", response.status_code)

    @contextlib.contextmanager
    def _mapping(self, endpoint: str) -> Iterator[None]:
        """httpx's errors as ours."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise TimedOut(self.url, endpoint, f"no answer in time ({type(error).__name__})") from error
        except TimeoutError as error:
            raise TimedOut(self.url, endpoint, f"silent for {self.patience.silence:g} s") from error
        except httpx.RemoteProtocolError as error:
            raise BadReply(self.url, endpoint, f"not HTTP, or cut short: {error}") from error
        except httpx.DecodingError as error:
            raise BadReply(self.url, endpoint, f"cannot be decoded: {error}") from error
        except httpx.TransportError as error:
            raise Unreachable(self.url, endpoint, str(error) or type(error).__name__) from error


async def split_lines(stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Lines of a stream, which end with a line feed alone: what a model says may hold every other character that ends lines."""
    parts: list[bytes] = []
    async for chunk in stream:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
    yield b"".join(parts)

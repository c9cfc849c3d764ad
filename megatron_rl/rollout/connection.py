"""HTTP to one server: requests, streams, and what goes wrong on the way as our own errors.

By aiohttp, because one event loop talks to all servers of a run: a request costs it the same however many others are under way.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp

from megatron_rl.config.errors import UserError
from megatron_rl.rollout.errors import BadReply, NoKey, Refused, TimedOut, Unreachable
from megatron_rl.rollout.replies import Untrusted

type Key = str | Callable[[], str | None] | None  # a server's API key, or what finds it

DATA, DONE = b"data:", b"[DONE]"  # of server-sent events
SHOWN = 200  # characters of a reply that an error shows
IDLE_SECONDS = 2.0  # that a connection is kept for the next request; SGLang closes it after 5


@dataclass(frozen=True)
class Patience:
    """How long a server may take, in seconds."""

    connect: float = 10.0
    answer: float = 60.0  # a question or a control call
    silence: float = 300.0  # between two pieces of a response, and before the first
    update: float = 3600.0  # new weights, memory


class Connection:
    """All requests to one server; as many at a time as there are callers.

    A key that is to be found is looked for with the first request, and with the next after one that was refused for its sake:
    whoever starts servers may make it later than a run begins.
    """

    def __init__(self, url: str, api_key: Key, patience: Patience) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self._held = False
        self._silences: set[asyncio.Timeout] = set()  # of the streams that run
        self._api_key = api_key
        self._headers: dict[str, str] | None = None  # with the key, once it is found
        self._opened: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        for session in self._opened.values():
            await session.close()

    def _http(self, *, reuse: bool) -> aiohttp.ClientSession:
        """Opened at the first request, since it belongs to the event loop that asks.

        Streams are many, and use connections again. All else goes over new ones: one that was cut while nobody used it is
        noticed only by the request that is lost on it, which a stream survives and the call of a publish would not.
        """
        if reuse not in self._opened:
            idle = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS) if reuse else None
            self._opened[reuse] = aiohttp.ClientSession(
                connector=idle or aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,  # a proxy of the environment would sit between us and the next machine, and cut streams short
            )
        return self._opened[reuse]

    def _authorized(self, endpoint: str) -> dict[str, str]:
        """The headers that show the key."""
        if self._headers is None:
            try:
                key = self._api_key() if callable(self._api_key) else self._api_key
            except UserError as error:
                raise NoKey(self.url, endpoint, str(error)) from error
            self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self._headers

    def _timeout(self, seconds: float | None) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=seconds, sock_connect=self.patience.connect)

    async def ask(self, endpoint: str) -> Mapping[str, Any]:
        """GET a JSON object."""
        return self._json(endpoint, await self._send("GET", endpoint, None, self.patience.answer))

    async def call(self, endpoint: str, body: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
        """POST, and get a JSON object."""
        return self._json(endpoint, await self._send("POST", endpoint, body, seconds))

    async def tell(self, endpoint: str, body: Mapping[str, Any] | None, seconds: float) -> None:
        """POST where the answer says nothing but whether it went well."""
        await self._send("POST", endpoint, body, seconds)

    async def status(self, endpoint: str) -> int:
        """The status of a GET, whatever it is."""
        async with self._asking("GET", endpoint, None, self._timeout(self.patience.answer)) as response:
            return response.status

    async def events(self, endpoint: str, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any]]:
        """The events of a stream until its end mark. A silence too long is TimedOut, an end without the mark BadReply.

        Leaving early closes the connection, at which the server aborts the request.
        """
        unhurried = self._timeout(None)  # a stream is timed by what it says
        async with contextlib.AsyncExitStack() as stack:
            async with self._listening(endpoint):
                response = await stack.enter_async_context(self._asking("POST", endpoint, body, unhurried, reuse=True))
            if response.status != HTTPStatus.OK:
                async with self._listening(endpoint):
                    self._refuse(endpoint, response.status, await response.read())
            lines, ended = split_lines(response.content.iter_any()), False
            while True:
                async with self._listening(endpoint):
                    line = await anext(lines, None)
                if line is None and not ended:
                    raise BadReply(self.url, endpoint, "the stream was cut short")
                if line is None:
                    return  # read to its end, so that the connection can be used again
                if line.strip() and not ended:
                    event = self._event(endpoint, line)
                    ended = event is None
                    if event is not None:
                        yield event

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

    async def _send(self, method: str, endpoint: str, body: Mapping[str, Any] | None, seconds: float) -> bytes:
        async with self._asking(method, endpoint, body, self._timeout(seconds)) as response:
            content = await response.read()
            if response.status != HTTPStatus.OK:
                self._refuse(endpoint, response.status, content)
            return content

    @contextlib.asynccontextmanager
    async def _asking(
        self,
        method: str,
        endpoint: str,
        body: Mapping[str, Any] | None,
        timeout: aiohttp.ClientTimeout,
        *,
        reuse: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The beginning of a response. Left before its end is read, the connection is closed."""
        http, url, headers = self._http(reuse=reuse), f"{self.url}{endpoint}", self._authorized(endpoint)
        with self._mapping(endpoint):
            async with http.request(
                method, url, json=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                yield response

    @contextlib.asynccontextmanager
    async def _listening(self, endpoint: str) -> AsyncIterator[None]:
        """As long as a silence may be; while the server is held, as long as it takes."""
        silence = asyncio.timeout_at(self._deadline())
        self._silences.add(silence)
        try:
            async with silence:
                yield
        except TimeoutError as error:
            if silence.expired():
                raise TimedOut(self.url, endpoint, f"silent for {self.patience.silence:g} s") from error
            raise
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
            status = code if isinstance(code, int) else HTTPStatus.INTERNAL_SERVER_ERROR
            raise Refused(self.url, endpoint, str(error.get("message", event["error"]))[:SHOWN], status)
        return event

    def _json(self, endpoint: str, text: bytes) -> Mapping[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise BadReply(self.url, endpoint, f"not JSON ({error}): {text[:SHOWN]!r}") from error
        if not isinstance(value, dict):
            raise BadReply(self.url, endpoint, f"a JSON object was expected: {text[:SHOWN]!r}")
        return value

    def _refuse(self, endpoint: str, status: int, content: bytes) -> None:
        """Raise what an answer other than 200 says, in the server's own words where it has some."""
        words = content.decode(errors="replace").strip()
        with contextlib.suppress(ValueError):
            told = json.loads(words)
            if isinstance(told, dict):
                error = told.get("error", told.get("message", told.get("detail", words)))
                words = str(error.get("message", error) if isinstance(error, dict) else error)
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            self._headers = None
            words = f"{words}. Give the server's API key (servers.api_key_file)"
        raise Refused(self.url, endpoint, words[:SHOWN] or "refused without a word", status)

    @contextlib.contextmanager
    def _mapping(self, endpoint: str) -> Iterator[None]:
        """aiohttp's errors as ours."""
        try:
            yield
        except TimeoutError as error:  # aiohttp's own among them
            raise TimedOut(self.url, endpoint, f"no answer in time ({type(error).__name__})") from error
        except (aiohttp.ClientPayloadError, aiohttp.ClientResponseError) as error:
            raise BadReply(self.url, endpoint, f"not HTTP, or cut short: {error}") from error
        except aiohttp.ClientConnectorError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise Unreachable(self.url, endpoint, f"no connection ({reason})") from error
        except (aiohttp.ClientError, OSError) as error:  # the latter of a connection that breaks while it is written to
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

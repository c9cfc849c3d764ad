"""Asking a server for a score: with a limit on time and size, again where that is safe, and believing no answer unread."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import httpx
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from megatron_rl.config.errors import SettingsError
from megatron_rl.rewards.base import AwaitedReward, Options, RewardError, TimedOptions, checked, column
from megatron_rl.types import Prompt, Sample

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # may be gone the next time
LONGEST_WAIT = 30.0  # seconds before another try
LARGEST_REPLY = 4 << 20
PLACEHOLDER = re.compile(r"\{(\w+)\}")
OURS = ("prompt", "response", "messages", "conversation")  # placeholders that are no columns


def web_address(url: str) -> str:
    """An address that can be asked."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"is no address: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("is no address of a server; write http://host:port/path")
    return url


class RemoteOptions(TimedOptions):
    """Options of rewards that ask a server."""

    url: str = Field(description="Address of the server.")
    timeout: float = Field(60.0, gt=0, description="Seconds for one try.")
    retries: NonNegativeInt = Field(
        4, description="More tries after one that failed in passing: no connection, 429, 5xx, time."
    )
    backoff: NonNegativeFloat = Field(0.5, description="Seconds before the second try; doubled before each further one.")
    concurrency: PositiveInt = Field(32, description="Samples that wait for the server at once.")
    api_key_file: Path | None = Field(None, description="A file that holds a key, sent as `Authorization: Bearer`.")

    _url = field_validator("url")(web_address)


class RemoteReward[O: RemoteOptions](AwaitedReward[O]):
    """A reward that asks a server.

    Asking for a score changes nothing, so every request may be sent again.
    """

    def __init__(self, options: O) -> None:
        super().__init__(options)
        self.concurrency = options.concurrency
        self.client: httpx.AsyncClient | None = None

    async def open(self) -> None:
        headers = {}
        if (path := self.options.api_key_file) is not None:
            try:
                headers["Authorization"] = f"Bearer {path.read_text().strip()}"
            except OSError as error:
                raise SettingsError(f"{self.name}: api_key_file = {path}: cannot be read: {error.strerror}.") from error
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self.client = httpx.AsyncClient(headers=headers, limits=limits, timeout=self.options.timeout, trust_env=False)

    async def close(self) -> None:
        if self.client is not None:
            await self.client.aclose()

    async def ask(self, url: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers with. What stays wrong is a RewardError."""
        for attempt in range(self.options.retries + 1):
            try:
                async with asyncio.timeout(self.options.timeout):
                    status, text, wait = await self._post(url, body)
                problem = f"{url} answered {status}: {text[:200]!r}"
                if status == 200:
                    return _json(text, url)
                if status not in PASSING:
                    raise RewardError(problem)
            except TimeoutError:
                problem, wait = f"{url} did not answer within {self.options.timeout:g} s", None
            except httpx.HTTPError as error:
                problem, wait = f"{url}: {type(error).__name__}: {error}", None
            if attempt < self.options.retries:
                pause = min(LONGEST_WAIT, wait or self.options.backoff * 2**attempt * random.uniform(0.5, 1.5))
                await asyncio.sleep(pause)
        raise RewardError(f"{problem} (tried {self.options.retries + 1} times)")

    async def _post(self, url: str, body: Mapping[str, Any]) -> tuple[int, str, float | None]:
        assert self.client is not None, "open() comes first"
        async with self.client.stream("POST", url, json=body) as reply:
            received = bytearray()
            async for piece in reply.aiter_bytes():
                received += piece
                if len(received) > LARGEST_REPLY:
                    raise RewardError(f"{url} answered with more than {LARGEST_REPLY >> 20} MiB")
            wait = reply.headers.get("retry-after", "")
        return reply.status_code, received.decode(errors="replace"), float(wait) if wait.isdecimal() else None


def _json(text: str, url: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{url} answered with what is no JSON ({error}): {text[:100]!r}") from None


# -- requests ----------------------------------------------------------------------------------------------------------------


def placeholders(template: Any) -> frozenset[str]:
    """The names in {braces}, in any text of a template."""
    if isinstance(template, str):
        return frozenset(PLACEHOLDER.findall(template))
    parts = template.values() if isinstance(template, Mapping) else template if isinstance(template, list | tuple) else ()
    return frozenset().union(*map(placeholders, parts))


def columns_of(template: Any) -> frozenset[str]:
    return placeholders(template) - set(OURS)


def fill(template: Any, value: Callable[[str], Any]) -> Any:
    """A template with its placeholders replaced: once, so that braces in what is put in stay as they are.

    A text that is a placeholder and nothing else becomes the value itself, a list say.
    """
    if isinstance(template, Mapping):
        return {name: fill(part, value) for name, part in template.items()}
    if isinstance(template, list | tuple):
        return [fill(part, value) for part in template]
    if not isinstance(template, str):
        return template
    if whole := PLACEHOLDER.fullmatch(template):
        return value(whole[1])
    return PLACEHOLDER.sub(lambda match: _written(value(match[1])), template)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def values(prompt: Prompt, text: str) -> Callable[[str], Any]:
    """What placeholders stand for."""

    def value(name: str) -> Any:
        messages = [dict(message) for message in prompt.messages]
        match name:
            case "response":
                return text
            case "prompt" | "messages" | "conversation" if not messages:
                raise RewardError(f"prompt {prompt.key} has no messages; name a column instead of {{{name}}}")
            case "prompt":
                return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
            case "messages":
                return messages
            case "conversation":
                return [*messages, {"role": "assistant", "content": text}]
        return column(prompt, name)

    return value


# -- a reward model ------------------------------------------------------------------------------------------------------------


class HttpOptions(RemoteOptions):
    body: dict[str, Any] = Field(
        {"prompt": "{prompt}", "response": "{response}"},
        description="The JSON that is sent. {prompt} is the last user message, {response} what is judged, {messages} the "
        "prompt's messages, {conversation} these with the response, any other {name} a column.",
    )
    score: str = Field(
        "score", description="Where the answer holds the score: names and numbers with dots, `0.embedding.0` say."
    )


class Http(RemoteReward[HttpOptions]):
    """The score that a reward model gives over HTTP: a request is posted as JSON, the number is read from the answer."""

    name: ClassVar[str] = "http"
    takes: ClassVar[type[Options]] = HttpOptions
    example: ClassVar[str] = "{name: http, options: {url: 'http://127.0.0.1:9000/score', score: reward}}"

    def columns(self) -> frozenset[str]:
        return columns_of(self.options.body)

    async def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        answer = await self.ask(self.options.url, fill(self.options.body, values(prompt, text)))
        found = answer
        for step in self.options.score.split("."):
            try:
                found = found[int(step)] if isinstance(found, list) else found[step]
            except (KeyError, IndexError, TypeError, ValueError):
                raise RewardError(f"{self.options.url} answered without '{self.options.score}': {answer!r:.200}") from None
        if isinstance(found, bool):
            raise RewardError(f"{self.options.url} answered with {found} where a number should stand")
        return checked(found)

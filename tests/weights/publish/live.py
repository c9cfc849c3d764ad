"""Help for tests that publish to real servers: policies, requests under way, and what transformers says."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.client import Client, PauseMode, Sampling
from megatron_rl.rollout.replies import Piece
from megatron_rl.train.publishing import open_publisher
from megatron_rl.weights.publish.ports import Connect
from megatron_rl.weights.publish.publisher import Publisher
from tests.servers import VOCABULARY

CLOSE = 1e-4  # log-probs in float32, by different kernels
SECONDS = 120.0  # far above what anything here takes: a hang fails
PROMPT_LENGTH, LONG = 8, 192  # tokens of a request and of its response
LONGEST = 1536  # that the model's positions allow
KEY = "a-key-of-the-tests-alone"  # of the dense server; servers without one do not look at it
AT_ONCE = 32
SETTLED = 0.3  # seconds in which what a paused server had sent has been heard


def settings_of(model: Path, publish: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {
        "policy": {"init": model},
        "precision": {"dtype": "float32"},
        "batch": {"max_tokens": 128},
        "publish": {"bucket_bytes": 100_000, **(publish or {})},  # several buckets
        **sections,
    }


def connect(url: str) -> Client:
    return Client(url, VOCABULARY, KEY)


def run[T](work: Awaitable[T]) -> T:
    async def in_time() -> T:
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(in_time())


def with_publisher[T](model: Path, work: Callable[[Publisher], Awaitable[T]], connect: Connect = connect, **sections: Any) -> T:
    """Do something with a publisher of a policy that has the weights of a folder."""
    policy = Policy.open(Settings.model_validate(settings_of(model, **sections)), Launch())
    try:
        return run(work(open_publisher(policy, connect)))
    finally:
        policy.close()


def log_probs(model: Path, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """[tokens] of each sequence by transformers; 0 for the first token."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for tokens in sequences:
        with torch.no_grad():
            logits = loaded(torch.tensor([list(tokens)])).logits[0, :-1]  # [tokens - 1, vocab]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(list(tokens)[1:])[:, None])[:, 0]
        found.append(np.concatenate([[np.float32(0)], chosen.numpy()]))
    return found


async def serves(url: str, model: Path, version: int) -> None:
    """Assert that the server scores and samples with these weights, and says so."""
    async with connect(url) as client:
        await _serves(client, model, version)


async def _serves(client: Client, model: Path, version: int) -> None:
    generator = np.random.default_rng(5)
    sequences = [generator.integers(0, VOCABULARY, 24).tolist() for _ in range(4)]
    for tokens, expected in zip(sequences, log_probs(model, sequences), strict=True):
        np.testing.assert_allclose(await client.score(tokens), expected, atol=CLOSE)
    response = await client.generate(sequences[0], Sampling(max_new_tokens=12, ignore_end=True), cache_key=f"check {version}")
    (expected,) = log_probs(model, [[*sequences[0], *response.tokens.tolist()]])
    np.testing.assert_allclose(response.log_probs, expected[24:], atol=CLOSE)
    assert {span.version for span in response.spans} == {version}


@dataclass(frozen=True)
class Response:
    """A response as it came: pieces of tokens with the version that the server gave them."""

    prompt: list[int]
    pieces: list[Piece]

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def log_probs(self) -> NDArray[np.float32]:
        return np.array([value for piece in self.pieces for value in piece.log_probs], np.float32)

    @property
    def before(self) -> int:
        """Tokens that came under the first version, or, sampled by it, were still on their way when an update had begun."""
        first = self.pieces[0].version
        return sum(len(piece.tokens) for piece in self.pieces if piece.version in (first, None))


class Load:
    """Long requests that are under way when a publish pauses the server: all begun, none finished."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self._prompts = [generator.integers(0, VOCABULARY, PROMPT_LENGTH).tolist() for _ in range(AT_ONCE)]
        self._requests: list[asyncio.Task[Response]] = []
        self.length = LONG  # tokens of a response
        self.finished: list[Response] = []

    def connect(self, url: str) -> Client:
        return _Loaded(url, self)

    @property
    def too_short(self) -> bool:
        """Has one come to its end? On a busy machine it may, before this has heard of all."""
        return any(each.done() and each.result().pieces[-1].finish == "length" for each in self._requests)

    async def lengthen(self) -> None:
        await asyncio.gather(*self._requests)
        self.length *= 2
        assert self.length <= LONGEST

    async def begin(self, client: Client) -> None:
        """Begin all, and hear of each."""
        begun = asyncio.Semaphore(0)

        async def request(prompt: list[int]) -> Response:
            pieces: list[Piece] = []
            sampling = Sampling(max_new_tokens=self.length, ignore_end=True, piece=4)
            async for piece in client.stream(prompt, sampling, cache_key="under load"):
                if not pieces:
                    begun.release()
                pieces.append(piece)
            return Response(prompt, pieces)

        self._requests = [asyncio.create_task(request(prompt)) for prompt in self._prompts]
        for _ in self._requests:
            await begun.acquire()

    async def end(self) -> None:
        self.finished = list(await asyncio.gather(*self._requests))


class _Loaded(Client):
    """A client that brings the requests under way just before it pauses the server."""

    def __init__(self, url: str, load: Load) -> None:
        super().__init__(url, VOCABULARY, KEY)
        self._load = load

    async def pause(self, mode: PauseMode) -> None:
        while True:
            await self._load.begin(self)
            await super().pause(mode)
            await asyncio.sleep(SETTLED)
            if not self._load.too_short:
                return
            await super().resume()
            await self._load.lengthen()

    async def close(self) -> None:
        await self._load.end()
        await super().close()

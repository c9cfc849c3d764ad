"""Small help for tests that talk to a server."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.client import Client
from megatron_rl.rollout.errors import Refused
from megatron_rl.rollout.replies import Piece
from megatron_rl.rollout.worker import Worker
from tests.servers import TinyServer

PROMPT = [10, 20, 30, 40, 50, 60, 70]
SECONDS = 120.0  # far above what anything here takes: a hang fails instead of waiting for the test's own limit


def talk[T](server: TinyServer, work: Callable[[Client], Awaitable[T]]) -> T:
    """Run a conversation with the server on a client of its own."""

    async def conversation() -> T:
        async with asyncio.timeout(SECONDS), server.client() as client:
            return await work(client)

    return asyncio.run(conversation())


async def flush(client: Client) -> None:
    """Flush the cache of a server that is idle, or will be: a response arrives a moment before the server is done with it."""
    for _ in range(20):
        with suppress(Refused):
            await client.flush_cache()
            return
        await asyncio.sleep(0.05)
    await client.flush_cache()


class Watch:
    """Counts the tokens that arrive from a server, so that a test can act in the middle of responses, however fast they are."""

    def __init__(self, worker: Worker) -> None:
        self.tokens: Counter[str] = Counter()  # by request
        self._stream = worker.client.stream
        worker.client.stream = self._counted  # type: ignore[method-assign, assignment]

    async def _counted(self, *given: Any, request: str, **more: Any) -> AsyncGenerator[Piece]:
        async with aclosing(self._stream(*given, request=request, **more)) as pieces:
            async for piece in pieces:
                self.tokens[request] += len(piece.tokens)
                yield piece

    async def until(self, requests: int, tokens: int) -> None:
        """So many more requests have brought so many tokens."""
        before = self.tokens.copy()
        while sum(count - before[request] >= tokens for request, count in self.tokens.items()) < requests:
            await asyncio.sleep(0.002)


def reference_log_probs(
    model: Path, tokens: list[int], temperature: float = 1.0, masked: Sequence[int] = ()
) -> NDArray[np.float32]:
    """[tokens] log-probs by transformers; 0 for the first token. Those that are masked cannot be drawn."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(torch.tensor([tokens])).logits[0, :-1]  # [tokens - 1, vocab]
    logits[:, list(masked)] = -torch.inf
    chosen = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return np.concatenate([[np.float32(0)], chosen.numpy()])

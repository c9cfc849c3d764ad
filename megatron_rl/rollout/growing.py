"""A response that may take several servers: what it has, and what is still to be asked for.

A server that dies, is quarantined or is updated leaves us the tokens that it has streamed. The rest is asked for with those as
part of the prompt: given the same weights that draws from the same distribution, and given new ones it is two spans.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.replies import Finish, Generation, Piece, Routing, Span, join_spans


class Growing:
    """One response under way."""

    def __init__(self, prompt: Sequence[int] | NDArray[np.int64], sampling: Sampling) -> None:
        self._prompt = [int(token) for token in prompt]
        self._sampling = sampling
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._spans: list[Span] = []
        self._routing: Routing | None = None  # [positions of earlier attempts, layers, chosen]
        self._cached: int | None = None

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def weight(self) -> int:
        """Tokens that it may come to hold on a server."""
        return len(self._prompt) + self._sampling.max_new_tokens

    @property
    def full(self) -> bool:
        return self.length >= self._sampling.max_new_tokens

    def rest(self) -> tuple[list[int], Sampling]:
        """What to ask a server for now.

        A server looks for stop texts in what it generates alone. One that began on a server before and ends on the next
        would be missed, so as many last tokens as could be its beginning are drawn again.
        """
        longest = max((len(text.encode()) for text in self._sampling.stop), default=0)
        self._keep(max(0, self.length - max(0, longest - 1)))
        return [*self._prompt, *self._tokens], replace(
            self._sampling,
            max_new_tokens=self._sampling.max_new_tokens - self.length,
            min_new_tokens=max(0, self._sampling.min_new_tokens - self.length),
        )

    def absorb(self, piece: Piece) -> None:
        """More of it. The routing of a position is that of the server which sampled what follows it."""
        self._tokens += piece.tokens
        self._log_probs += piece.log_probs
        self._spans.append(Span(piece.version, len(piece.tokens)))
        self._cached = piece.cached if self._cached is None else self._cached
        if piece.routing is not None:
            whole = piece.routing.copy()
            if self._routing is not None:
                whole[: len(self._routing)] = self._routing
            self._routing = whole

    def generation(self, finish: Finish) -> Generation:
        """As it is now. Routing that covers only a beginning is worth nothing, and left out."""
        positions = len(self._prompt) + self.length - 1
        whole = self._routing is not None and len(self._routing) == positions
        return Generation(
            tokens=np.array(self._tokens, dtype=np.int64),
            log_probs=np.array(self._log_probs, dtype=np.float32),
            spans=join_spans(self._spans),
            finish=finish,
            routing=self._routing if whole else None,
            cached=self._cached or 0,
        )

    def _keep(self, count: int) -> None:
        """Forget all tokens but so many."""
        self._tokens, self._log_probs = self._tokens[:count], self._log_probs[:count]
        spans, left = [], count
        for span in self._spans:
            spans.append(Span(span.version, min(span.length, left)))
            left -= spans[-1].length
        self._spans = spans
        if self._routing is not None:
            self._routing = self._routing[: max(0, len(self._prompt) + count - 1)]

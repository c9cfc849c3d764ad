"""A response that may take several servers: what it has, and what is still to be asked for.

A server that dies, is quarantined or is updated leaves us the tokens that it has streamed. The rest is asked for with those as
part of the prompt: given the same weights that draws from the same distribution, and given new ones it is two spans.

A server looks for stop texts in what it generates itself. One that begins in what another has generated is ours to find.

What the last step of an aborted response has added nobody has looked at: SGLang takes the abort for its end before it asks
whether the token is one that ends responses, or completes a stop text (sglang 0.5.17, srt/managers/schedule_batch.py,
Req.update_finish_state). Gone on from, the response would run past its end. So that step is left out whatever it brought, which
changes no distribution, and is done again.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.replies import Finish, Generation, Piece, Routing, Span, join_spans

type Decode = Callable[[Sequence[int]], str]


class Growing:
    """One response under way. `decode` turns tokens into text; it is needed where there are stop texts."""

    def __init__(self, prompt: Sequence[int] | NDArray[np.int64], sampling: Sampling, decode: Decode | None = None) -> None:
        if sampling.stop and decode is None:
            raise ValueError("stop texts can only be found in responses that go on elsewhere with the tokenizer's decode")
        self._prompt = [int(token) for token in prompt]
        self._sampling = sampling
        self._decode = decode
        self._reach = max((len(text.encode()) for text in sampling.stop), default=0)  # tokens that a stop text may take
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._spans: list[Span] = []
        self._routing: Routing | None = None  # [positions of earlier servers, layers, chosen]
        self._cached: int | None = None
        self._joint = 0  # where the present server began
        self._stop: int | None = None  # the length at which a stop text that begins before the joint ends

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

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended across the joint; what came after it is not part of the response."""
        return self._stop is not None

    def rest(self) -> tuple[list[int], Sampling]:
        """What to ask the next server for."""
        self._joint = self.length
        return [*self._prompt, *self._tokens], replace(
            self._sampling,
            max_new_tokens=self._sampling.max_new_tokens - self.length,
            min_new_tokens=max(0, self._sampling.min_new_tokens - self.length),
        )

    def absorb(self, piece: Piece, stride: int = 1) -> None:
        """More of it; a step of that server's decoding adds at most `stride` tokens.

        The routing of a position is that of the server which sampled what follows it.
        """
        before = self.length
        count = len(piece.tokens) if piece.finish != "abort" else max(0, len(piece.tokens) - stride)
        self._tokens += piece.tokens[:count]
        self._log_probs += piece.log_probs[:count]
        self._spans.append(Span(piece.version, count))
        self._cached = piece.cached if self._cached is None else self._cached
        if piece.routing is not None:
            whole = piece.routing[: len(piece.routing) - (len(piece.tokens) - count)].copy()
            if self._routing is not None:
                whole[: len(self._routing)] = self._routing
            self._routing = whole
        if self._stop is None and self._joint > 0 and self._reach > 0:
            self._stop = self._seek(before)

    def generation(self, finish: Finish) -> Generation:
        """As it is now. Routing that covers only a beginning is worth nothing, and left out."""
        length = self.length if self._stop is None else self._stop
        positions = len(self._prompt) + length - 1
        whole = self._routing is not None and len(self._routing) >= positions
        return Generation(
            tokens=np.array(self._tokens[:length], dtype=np.int64),
            log_probs=np.array(self._log_probs[:length], dtype=np.float32),
            spans=join_spans(self._spans, length),
            finish=finish if self._stop is None else "stop",
            routing=self._routing[:positions] if whole and self._routing is not None else None,
            cached=self._cached or 0,
        )

    def _seek(self, before: int) -> int | None:
        """The first length beyond `before` at which a stop text has come about that began before the joint."""
        assert self._decode is not None
        first, last = self._joint - self._reach, self._joint + self._reach
        for length in range(max(before, self._joint) + 1, min(self.length, last) + 1):
            text = self._decode(self._tokens[max(0, first) : length])
            if any(stop in text for stop in self._sampling.stop):
                return length
        return None

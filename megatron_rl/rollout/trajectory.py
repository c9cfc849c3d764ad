"""A sample while it grows: the prompt, then what the policy and an environment add to it, turn by turn.

Tokens that the policy wrote enter once, as the server reported them, and are never turned into text and back. Every change of
author or of the weights' version begins a segment.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout.replies import Generation
from megatron_rl.types import Sample, Segment

type SampleFinish = Literal["stop", "length", "abort", "budget", "error"]


@dataclass
class Trajectory:
    """Grows by `respond` and `observe`; `sample` is what has become of it."""

    tokens: list[int]
    log_probs: list[float]
    segments: list[Segment]
    turn: int = 0  # the turn that the policy's next tokens belong to
    turn_rewards: list[float] = field(default_factory=list)
    routing: NDArray[np.uint8] | NDArray[np.uint16] | None = None

    @classmethod
    def begin(cls, prompt: NDArray[np.int64]) -> Self:
        length = len(prompt)
        return cls(prompt.tolist(), [0.0] * length, [Segment(0, length, "prompt")])

    @classmethod
    def resume(cls, sample: Sample) -> Self:
        """Go on from a sample that was cut short."""
        turn = max((segment.turn for segment in sample.segments), default=0)
        if sample.segments and sample.segments[-1].author == "environment":
            turn += 1
        trajectory = cls(sample.tokens.tolist(), sample.log_probs.tolist(), list(sample.segments), turn)
        trajectory.turn_rewards = list(sample.turn_rewards)
        trajectory.routing = sample.routing
        return trajectory

    def fork(self) -> "Trajectory":
        """An independent copy."""
        lists = (list(self.tokens), list(self.log_probs), list(self.segments))
        return Trajectory(*lists, self.turn, list(self.turn_rewards), self.routing)

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def turn_tokens(self) -> int:
        """How many tokens the policy has written in the present turn."""
        return sum(s.stop - s.start for s in self.segments if s.author == "policy" and s.turn == self.turn)

    def respond(self, generation: Generation, *, learned: bool = True) -> None:
        """The policy's tokens, or more of them where a response goes on."""
        start = self.length
        self.tokens += generation.tokens.tolist()
        self.log_probs += generation.log_probs.tolist()
        for span in generation.spans:
            self._extend(Segment(start, start + span.length, "policy", span.version, self.turn, learned))
            start += span.length
        if generation.routing is not None:  # of all positions before its end; earlier ones keep that of who sampled there
            whole = generation.routing.copy()
            if self.routing is not None:
                whole[: len(self.routing)] = self.routing
            self.routing = whole

    def observe(self, tokens: list[int]) -> None:
        """An environment's answer; the policy's next tokens are another turn."""
        self._extend(Segment(self.length, self.length + len(tokens), "environment", turn=self.turn))
        self.tokens += tokens
        self.log_probs += [0.0] * len(tokens)
        self.turn += 1

    def _extend(self, new: Segment) -> None:
        last = self.segments[-1]
        if replace(last, start=new.start, stop=new.stop) == new:
            self.segments[-1] = replace(last, stop=new.stop)
        elif new.stop > new.start:
            self.segments.append(new)

    def response(self, turn: int | None = None) -> list[int]:
        """The policy's tokens of a turn, or of all turns."""
        return [
            token
            for segment in self.segments
            if segment.author == "policy" and turn in (None, segment.turn)
            for token in self.tokens[segment.start : segment.stop]
        ]

    def sample(self, finish: SampleFinish) -> Sample:
        """What there is now. Routing that covers only a beginning is worth nothing, and left out."""
        whole = self.routing is not None and len(self.routing) == self.length - 1
        return Sample(
            tokens=np.array(self.tokens, dtype=np.int64),
            log_probs=np.array(self.log_probs, dtype=np.float32),
            segments=tuple(self.segments),
            finish=finish,
            routing=self.routing if whole else None,
            turn_rewards=tuple(self.turn_rewards),
        )

"""What strategies stand on: the ports they are given, and the completion of one response.

A strategy is a small object with `run(prompt, floor, unfinished)`, which returns finished groups, or what there is of them
when sampling was interrupted. It knows no server: the floor generates, judges, and says when to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.replies import Generation
from megatron_rl.rollout.trajectory import SampleFinish, Trajectory
from megatron_rl.types import Prompt, Sample


class Generator(Protocol):
    """Where responses come from: the pool of servers. Samples of one group share a server where they can."""

    async def generate(self, tokens: NDArray[np.int64], sampling: Sampling, *, group: str) -> Generation: ...

    async def interrupt(self) -> None:
        """End what is under way; it comes back as it is, with finish "abort"."""


class Judge(Protocol):
    """Where rewards come from. What fails for one sample is that sample's failure."""

    async def score(self, prompt: Prompt, samples: Sequence[Sample]) -> Sequence[Sample]: ...


@dataclass(frozen=True)
class Limits:
    """How long things may become."""

    response: int  # tokens of one response, or of one turn
    total: int  # tokens of a sample, prompt and environment included
    turns: int = 1


@dataclass
class Floor:
    """Where a strategy works: its ports, how tokens are drawn, and whether sampling goes on."""

    generator: Generator
    judge: Judge
    sampling: Sampling
    limits: Limits
    interrupted: bool = False  # responses that were cut off are handed back instead of gone on with

    async def interrupt(self) -> None:
        self.interrupted = True
        await self.generator.interrupt()

    async def complete(
        self, trajectory: Trajectory, group: str, limit: int | None = None, *, learned: bool = True
    ) -> SampleFinish:
        """Let the policy write until it ends a turn: "stop", "length" (its own limit), "budget" (the sample's), "abort".

        A response that a server gave up is gone on with from its last token, unless sampling is interrupted.
        """
        while True:
            own = (limit or self.limits.response) - trajectory.turn_tokens
            room = self.limits.total - trajectory.length
            if min(own, room) <= 0:
                return "length" if own <= room else "budget"
            if self.interrupted:
                return "abort"
            asked = min(own, room)
            least = min(max(self.sampling.min_new_tokens - trajectory.turn_tokens, 0), asked)
            sampling = replace(self.sampling, max_new_tokens=asked, min_new_tokens=least)
            generation = await self.generator.generate(np.array(trajectory.tokens, dtype=np.int64), sampling, group=group)
            trajectory.respond(generation, learned=learned)
            if generation.finish == "stop":
                return "stop"
            if generation.finish == "length" and len(generation.tokens) < asked:
                return "budget"  # the server's own limit: it holds no longer sequence


@dataclass(frozen=True)
class Round:
    """What became of one prompt: groups that are finished, and samples that were cut off before they were.

    `unfinished` is None when all is done; else it is what `run` takes to go on: the samples of the group under way, in
    order, those that are whole among them.
    """

    groups: tuple["Graded", ...] = ()
    unfinished: tuple[Sample, ...] | None = None


@dataclass(frozen=True)
class Graded:
    """The samples of one group with their rewards. `part` tells several groups of one prompt apart (turns)."""

    samples: tuple[Sample, ...]
    part: str = ""
    information: dict[str, float] = field(default_factory=dict)


class Strategy(Protocol):
    """How a prompt becomes groups."""

    async def run(self, prompt: Prompt, key: str, floor: Floor, unfinished: Sequence[Sample] = ()) -> Round: ...


class StrategyFailed(Exception):
    """A prompt cannot be sampled: its environment does not start, say. Another is drawn instead."""


def is_whole(sample: Sample) -> bool:
    """Was the sample finished, or cut off?"""
    return sample.finish != "abort"

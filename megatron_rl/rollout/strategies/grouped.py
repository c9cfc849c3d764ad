"""G responses to a prompt, each drawn on its own: what GRPO, GSPO and most others learn from."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout.strategies.base import Floor, Graded, Round, is_whole
from megatron_rl.rollout.trajectory import Trajectory
from megatron_rl.types import Prompt, Sample


@dataclass(frozen=True)
class Grouped:
    """A group of `size` samples."""

    size: int

    async def run(self, prompt: Prompt, key: str, floor: Floor, unfinished: Sequence[Sample] = ()) -> Round:
        samples = await respond_in_parallel(prompt.tokens, self.size, key, floor, prompt.max_new_tokens, unfinished)
        if not all(map(is_whole, samples)):
            return Round(unfinished=tuple(samples))
        return Round((Graded(tuple(await floor.judge.score(prompt, samples))),))


async def respond_in_parallel(
    tokens: NDArray[np.int64], count: int, key: str, floor: Floor, limit: int | None, unfinished: Sequence[Sample] = ()
) -> list[Sample]:
    """So many responses to the same tokens; those that were cut off go on, those that were whole stay."""

    async def one(index: int) -> Sample:
        cut = unfinished[index] if index < len(unfinished) else None
        if cut is not None and is_whole(cut):
            return cut
        trajectory = Trajectory.begin(tokens) if cut is None else Trajectory.resume(cut)
        return trajectory.sample(await floor.complete(trajectory, key, limit))

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(index)) for index in range(count)]
    return [task.result() for task in running]

"""Episodes of several turns with an environment: the policy speaks, the environment answers, until one of them ends it.

The environment's tokens are context: they are in the sample, but not in its loss. An episode that was cut off goes on with
a new environment that is shown the turns there were; one that answers otherwise than before makes the episode begin again.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_rl.rollout.chat import Chat
from megatron_rl.rollout.environment import Environment, Observation
from megatron_rl.rollout.strategies.base import Floor, Graded, Round, is_whole
from megatron_rl.rollout.trajectory import Trajectory
from megatron_rl.types import Prompt, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episodes:
    """A group of `size` episodes of one prompt, each with an environment of its own."""

    size: int
    make_environment: Callable[[], Environment]
    chat: Chat
    reward_weight: float = 1.0  # of the environment's own rewards, summed over turns

    async def run(self, prompt: Prompt, key: str, floor: Floor, unfinished: Sequence[Sample] = ()) -> Round:
        async def one(index: int) -> Sample:
            cut = unfinished[index] if index < len(unfinished) else None
            return cut if cut is not None and is_whole(cut) else await self._episode(prompt, key, floor, cut)

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(index)) for index in range(self.size)]
        samples = [task.result() for task in running]
        if not all(map(is_whole, samples)):
            return Round(unfinished=tuple(samples))
        honest = await floor.judge.score(prompt, samples)
        return Round((Graded(tuple(self._with_turns(sample) for sample in honest)),))

    async def _episode(self, prompt: Prompt, key: str, floor: Floor, cut: Sample | None) -> Sample:
        trajectory = Trajectory.begin(prompt.tokens)
        try:
            environment = await started(self.make_environment, prompt)
            if cut is not None:
                trajectory, environment = await self._replayed(prompt, environment, Trajectory.resume(cut))
            return await self._play(trajectory, environment, key, floor, prompt.max_new_tokens)
        except EnvironmentFailed as error:
            return replace(trajectory.sample("error"), failure=str(error))

    async def _play(
        self, trajectory: Trajectory, environment: Environment, key: str, floor: Floor, limit: int | None
    ) -> Sample:
        while True:
            finish = await floor.complete(trajectory, key, limit)
            if finish != "stop":
                return trajectory.sample(finish)
            answer = trajectory.response(trajectory.turn)
            seen = await stepped(environment, self.chat.text(answer))
            trajectory.turn_rewards.append(seen.reward)
            if seen.done or trajectory.turn + 1 >= floor.limits.turns:
                return trajectory.sample("stop" if seen.done else "budget")
            observed = self.chat.continuation(seen.messages, answer)
            if trajectory.length + len(observed) >= floor.limits.total:
                return trajectory.sample("budget")
            trajectory.observe(observed)

    async def _replayed(
        self, prompt: Prompt, environment: Environment, trajectory: Trajectory
    ) -> tuple[Trajectory, Environment]:
        """The environment after the turns of a trajectory; a fresh episode if it does not repeat what it said."""
        answered = [segment for segment in trajectory.segments if segment.author == "environment"]
        for segment in answered:
            answer = trajectory.response(segment.turn)
            seen = await stepped(environment, self.chat.text(answer))
            expected = trajectory.tokens[segment.start : segment.stop]
            if seen.done or self.chat.continuation(seen.messages, answer) != expected:
                logger.warning(
                    "%s: %s answered otherwise than before: the episode begins again", prompt.key, type(environment).__name__
                )
                return Trajectory.begin(prompt.tokens), await started(self.make_environment, prompt)
        return trajectory, environment

    def _with_turns(self, sample: Sample) -> Sample:
        total = sum(sample.turn_rewards)
        if not any(sample.turn_rewards):
            return sample
        rewards = {**sample.rewards, "environment": total}
        return replace(sample, rewards=rewards, reward=sample.reward + self.reward_weight * total)


class EnvironmentFailed(Exception):
    """An environment raised: one sample's failure."""


async def started(make_environment: Callable[[], Environment], prompt: Prompt) -> Environment:
    environment = make_environment()
    try:
        await environment.reset(prompt)
    except Exception as error:
        raise EnvironmentFailed(f"{type(environment).__name__}.reset: {error!r}") from error
    return environment


async def stepped(environment: Environment, text: str) -> Observation:
    try:
        return await environment.step(text)
    except Exception as error:
        raise EnvironmentFailed(f"{type(environment).__name__}.step: {error!r}") from error

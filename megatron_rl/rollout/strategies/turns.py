"""Turn-level groups (TL-GRPO, arXiv 2601.16480): at each turn of one trajectory, G actions from the same history.

Each turn is a group of its own: its actions share the history, each is taken in a copy of the environment and rewarded for
what came of it, and they are compared with one another. The trajectory goes on with one of them, the first or the best.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_rl.rollout.chat import Chat
from megatron_rl.rollout.environment import Environment, Observation
from megatron_rl.rollout.strategies.base import Floor, Graded, Round, StrategyFailed
from megatron_rl.rollout.strategies.episodes import EnvironmentFailed, started, stepped
from megatron_rl.rollout.trajectory import SampleFinish, Trajectory
from megatron_rl.types import Prompt, Sample


@dataclass(frozen=True)
class Action:
    """One of a turn's actions, and what came of it."""

    trajectory: Trajectory
    finish: SampleFinish
    environment: Environment
    seen: Observation
    failure: str | None = None

    def sample(self) -> Sample:
        """Only this turn's tokens are learned: the history belongs to groups of its own."""
        whole = self.trajectory.sample(self.finish)
        now = self.trajectory.turn
        segments = tuple(replace(s, learned=s.learned and s.turn == now) for s in whole.segments)
        rewards = {"turn": self.seen.reward}
        return replace(whole, segments=segments, rewards=rewards, reward=self.seen.reward, failure=self.failure)


@dataclass(frozen=True)
class TurnGroups:
    """A group of `size` actions for each turn of a trajectory."""

    size: int
    make_environment: Callable[[], Environment]
    chat: Chat
    go_on_with: Literal["first", "best"] = "first"

    async def run(self, prompt: Prompt, key: str, floor: Floor, unfinished: Sequence[Sample] = ()) -> Round:
        """A trajectory that is cut off is thrown away with the turn under way: the turns before it are whole groups."""
        try:
            environment = await started(self.make_environment, prompt)
        except EnvironmentFailed as error:
            raise StrategyFailed(str(error)) from error
        history = Trajectory.begin(prompt.tokens)
        groups: list[Graded] = []
        while True:
            actions = await self._turn(history, environment, key, floor, prompt.max_new_tokens)
            if any(action.finish == "abort" for action in actions):
                return Round(self._valued(groups)) if groups else Round(unfinished=())
            groups.append(Graded(tuple(action.sample() for action in actions), part=f"turn{history.turn}"))
            chosen = actions[0] if self.go_on_with == "first" else max(actions, key=lambda action: action.seen.reward)
            if chosen.finish != "stop" or chosen.seen.done or history.turn + 1 >= floor.limits.turns:
                return Round(self._valued(groups))
            observed = self.chat.continuation(chosen.seen.messages, chosen.trajectory.response(history.turn))
            if chosen.trajectory.length + len(observed) >= floor.limits.total:
                return Round(self._valued(groups))
            history, environment = chosen.trajectory, chosen.environment
            history.observe(observed)

    async def _turn(
        self, history: Trajectory, environment: Environment, key: str, floor: Floor, limit: int | None
    ) -> list[Action]:
        async def act() -> Action:
            trajectory = history.fork()
            finish = await floor.complete(trajectory, key, limit)
            own = environment.fork()
            if finish != "stop":
                return Action(trajectory, finish, own, Observation(done=True))
            try:
                seen = await stepped(own, self.chat.text(trajectory.response(trajectory.turn)))
            except EnvironmentFailed as error:
                return Action(trajectory, "error", own, Observation(done=True), str(error))
            return Action(trajectory, finish, own, seen)

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(act()) for _ in range(self.size)]
        return [task.result() for task in running]

    def _valued(self, groups: list[Graded]) -> tuple[Graded, ...]:
        """The trajectory's value is its best turn's reward."""
        best = max(sample.reward for group in groups for sample in group.samples)
        return tuple(replace(group, information={"best_turn_reward": best}) for group in groups)

"""What an episode of several turns talks to: a tool, a game, a user.

Write a class with `reset` and `step` and name it by its dotted path in `sampling.environment`. One object serves one episode.
`fork` makes an independent copy in the same state; turn-level groups need it, and a deep copy is its default.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from megatron_rl.types import Prompt


@dataclass(frozen=True)
class Observation:
    """What came of a turn."""

    messages: tuple[Mapping[str, str], ...] = ()  # what the policy reads next, {"role", "content"}
    reward: float = 0.0  # of this turn
    done: bool = False  # the episode ends here


class Environment(ABC):
    """One episode."""

    @abstractmethod
    async def reset(self, prompt: Prompt) -> None:
        """A new episode begins with this prompt."""

    @abstractmethod
    async def step(self, text: str) -> Observation:
        """The policy said `text`."""

    def fork(self) -> Self:
        """An independent episode in the same state."""
        return copy.deepcopy(self)

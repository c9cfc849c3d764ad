"""What every reward is, and what scoring a sample gives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field, PositiveFloat

from megatron_rl.config.section import Section
from megatron_rl.types import Prompt, Sample


class RewardError(Exception):
    """One sample cannot be scored. The message is kept as the sample's failure."""


class Options(Section):
    """Options of a reward."""


class TimedOptions(Options):
    """Options of a reward that can take long."""

    timeout: PositiveFloat = Field(10.0, description="Seconds for one sample; more is a failure of that sample.")


class Reward[O: Options](ABC):
    """A judgement of one response. Its docstring's first line says what it is; `example` is an entry of `rewards:`."""

    name: ClassVar[str]
    takes: ClassVar[type[Options]]
    example: ClassVar[str]

    def __init__(self, options: O) -> None:
        self.options = options

    def columns(self) -> frozenset[str]:
        """The columns of the data that it reads."""
        return frozenset()

    def patience(self) -> float | None:
        """Seconds for one sample, waiting for its turn not counted. None: it keeps to a limit by itself."""
        return None


class ComputedReward[O: TimedOptions](Reward[O]):
    """A reward that computes. It runs in a worker process, which is killed and replaced when the time is up.

    It is made anew in every worker from its name and options.
    """

    def patience(self) -> float:
        return self.options.timeout

    def prepare(self) -> None:
        """What takes long once, imports say. A worker does it before it is asked anything."""
        return None

    @abstractmethod
    def score(self, prompt: Prompt, text: str, sample: Sample) -> float: ...


class AwaitedReward[O: Options](Reward[O]):
    """A reward that waits for others: it runs in the event loop of the sampler."""

    concurrency: int = 32  # samples that it scores at once

    async def open(self) -> None:
        """Get ready, or raise a UserError."""
        return None

    async def close(self) -> None:
        return None

    @abstractmethod
    async def score(self, prompt: Prompt, text: str, sample: Sample) -> float: ...


@runtime_checkable
class TellsAnswer(Protocol):
    """A reward that can tell which answer a response gives, beside whether it is right: responses can then vote."""

    def answer(self, text: str) -> str | None:
        """The answer, so written that equal ones are equal texts; None where there is none."""
        ...


@dataclass(frozen=True)
class Scored:
    """What a sample is worth."""

    rewards: Mapping[str, float]  # by component, unweighted; one that failed is not there
    reward: float  # their weighted sum
    failure: str | None = None

    def onto(self, sample: Sample) -> Sample:
        """The sample with its rewards. Components that it had already stay; a failure that it had already too."""
        rewards = {**sample.rewards, **self.rewards}
        return replace(sample, rewards=rewards, reward=self.reward, failure=sample.failure or self.failure)


def checked(value: Any) -> float:
    """A reward's answer as a finite number."""
    if isinstance(value, bool | int | float) or (hasattr(value, "item") and getattr(value, "ndim", 0) == 0):
        number = float(value)
        if math.isfinite(number):
            return number
    raise RewardError(f"a reward must be a finite number, this is {value!r:.100}")


def column(prompt: Prompt, name: str) -> Any:
    """What a column of the data says for this prompt."""
    if name not in prompt.fields:
        raise RewardError(f"prompt {prompt.key} has no column '{name}'; it has {', '.join(prompt.fields) or 'none'}")
    return prompt.fields[name]

"""A function of the user's own as a reward.

    def reward(prompt: Prompt, text: str, sample: Sample, **arguments) -> float
    async def reward(prompt: Prompt, text: str, sample: Sample, **arguments) -> float

A plain function runs in worker processes, where it may compute as long as its time-out says; an async one runs in the
sampler's event loop, where it must only wait.
"""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from megatron_rl.rewards.base import AwaitedReward, ComputedReward, Options, Reward, TimedOptions, checked
from megatron_rl.types import Prompt, Sample


class FunctionOptions(TimedOptions):
    timeout: float = Field(60.0, gt=0, description="Seconds for one sample; more is a failure of that sample.")
    concurrency: PositiveInt = Field(32, description="Samples that an async function scores at once.")
    arguments: dict[str, Any] = Field({}, description="What it is called with besides, by name.")


def find(path: str) -> Callable[..., Any]:
    """The function at `package.module:name`, or a ValueError that says why there is none."""
    module, _, attribute = path.partition(":")
    try:
        room = import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot be loaded: {error}. Is its package importable from here ({sys.path[0] or '.'})?") from error
    found = getattr(room, attribute, None)
    if found is None:
        raise ValueError(f"cannot be loaded: {getattr(room, '__file__', None) or module} has no {attribute}. Correct its name")
    if not inspect.isroutine(found):
        raise ValueError(f"is a {type(found).__name__}; name a function")
    return found


def reward_of(path: str) -> type[Reward[Any]]:
    """The reward that a function is."""
    function = find(path)
    if inspect.iscoroutinefunction(function):
        return type("AwaitedFunction", (AwaitedFunction,), {"name": path, "function": staticmethod(function)})
    return type("ComputedFunction", (ComputedFunction,), {"name": path, "function": staticmethod(function)})


def refuse_call(function: Callable[..., Any], options: FunctionOptions) -> None:
    """Raise a ValueError where the function cannot be called as it will be."""
    try:
        inspect.signature(function).bind(None, "", None, **options.arguments)
    except TypeError as error:
        raise ValueError(
            f"cannot be called with (prompt, text, sample) and {options.arguments or 'no arguments'}: {error}"
        ) from None


class ComputedFunction(ComputedReward[FunctionOptions]):
    """A plain function of yours."""

    takes: ClassVar[type[Options]] = FunctionOptions
    example: ClassVar[str] = "{name: 'my_rewards:brevity', options: {arguments: {scale: 100}}}"
    function: ClassVar[Callable[..., Any]]

    def __init__(self, options: FunctionOptions) -> None:
        super().__init__(options)
        refuse_call(self.function, options)

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        return checked(self.function(prompt, text, sample, **self.options.arguments))


class AwaitedFunction(AwaitedReward[FunctionOptions]):
    """An async function of yours."""

    takes: ClassVar[type[Options]] = FunctionOptions
    example: ClassVar[str] = "{name: 'my_rewards:ask_a_service', options: {timeout: 5}}"
    function: ClassVar[Callable[..., Any]]

    def __init__(self, options: FunctionOptions) -> None:
        super().__init__(options)
        self.concurrency = options.concurrency
        refuse_call(self.function, options)

    def patience(self) -> float:
        return self.options.timeout

    async def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        return checked(await self.function(prompt, text, sample, **self.options.arguments))

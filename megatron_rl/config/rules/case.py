"""What a rule looks at, and how it says what is wrong."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_rl.config.architecture import Architecture, Experts
from megatron_rl.config.settings import LayoutSettings, Settings


@dataclass(frozen=True)
class Case:
    """A run before it starts: its settings, the model, and the number of ranks."""

    settings: Settings
    architecture: Architecture
    world_size: int

    @property
    def layout(self) -> LayoutSettings:
        return self.settings.layout

    @property
    def experts(self) -> Experts | None:
        return self.architecture.experts if self.architecture.is_moe else None


type Rule = Callable[[Case], Iterator[str]]


def problem(what: str, reason: str, fix: str) -> str:
    """One line: the settings with their values, why they cannot work, what would."""
    return f"{what}: {reason}. {fix}."


def divisors(number: int) -> str:
    """The sizes that divide a number evenly: `1, 2, 4 or 8`."""
    return either(divisor for divisor in range(1, number + 1) if number % divisor == 0)


def either(options: Iterable[object]) -> str:
    *others, last = map(str, options)
    return f"{', '.join(others)} or {last}" if others else last


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"

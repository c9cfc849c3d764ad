"""What people ask of a bank: samples by step, key, text or reward, and a summary of each step. In cells of the sealed form."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.schema import PLAN_COLUMNS, REWARD, Decode, cells_of_sample
from megatron_rl.types import Group

TEXTS = ("prompt_text", "response_text")
NEEDS = ("group", "finish", "failure", "reward")  # what `Wanted` asks of a sample, with the components


@dataclass(frozen=True)
class Found:
    """A sample and where it lies."""

    where: str  # "step 12", "waiting", "carried"
    cells: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.where}  {self.cells['group']}  sample {self.cells['sample']}"


@dataclass(frozen=True)
class Wanted:
    """Which samples. What is None does not matter."""

    group: str | None = None
    least_reward: float | None = None
    most_reward: float | None = None
    reward: str | None = None  # a component's name in place of the whole reward
    finish: str | None = None
    failed: bool | None = None

    def fits(self, cells: Mapping[str, Any]) -> bool:
        value = cells["reward"] if self.reward is None else cells.get(f"{REWARD}{self.reward}")
        return (
            self.group in (None, cells["group"])
            and self.finish in (None, cells["finish"])
            and self.failed in (None, cells["failure"] is not None)
            and (self.least_reward is None or (value is not None and value >= self.least_reward))
            and (self.most_reward is None or (value is not None and value <= self.most_reward))
        )


def require_reward(reader: BankReader, name: str, step: int | None = None) -> None:
    """Raise a BankError where no sample has a component of this name."""
    known: set[str] = set()
    for number in reader.steps() if step is None else [step]:
        with reader.step(number) as sealed:
            known |= {column.removeprefix(REWARD) for column in sealed.column_names if column.startswith(REWARD)}
    if step is None:
        for group in (*reader.waiting(), *reader.carried()):
            known |= {component for sample in group.samples for component in sample.rewards}
    if name not in known:
        raise BankError(
            f"--reward {name}: no sample has a component of this name. There is {', '.join(sorted(known)) or 'none'}."
        )


def samples(
    reader: BankReader,
    wanted: Wanted,
    *,
    step: int | None = None,
    names: Sequence[str] | None = None,
    decode: Decode | None = None,
) -> Iterator[Found]:
    """Samples of a step, or of all steps, then those that wait and go on. `decode` makes texts that are not kept."""
    for number in reader.steps() if step is None else [step]:
        with reader.step(number) as sealed:
            asked = None if names is None else [name for name in names if name in sealed.column_names]
            for cells in sealed.cells(asked):
                if wanted.fits(cells):
                    yield Found(f"step {number}", _with_texts(cells, decode))
    if step is None:
        for where, groups in (("waiting", reader.waiting()), ("carried", reader.carried())):
            yield from (Found(where, cells) for cells in _cells(groups, decode) if wanted.fits(cells))


def matches(text: str, pattern: re.Pattern[str], width: int = 60) -> list[tuple[str, str, str]]:
    """What stands before, in and behind each match, on one line."""
    found = []
    for match in pattern.finditer(text):
        before, after = text[max(0, match.start() - width) : match.start()], text[match.end() : match.end() + width]
        found.append(tuple(part.replace("\n", "⏎") for part in (before, match[0], after)))
    return [(before, inside, after) for before, inside, after in found]


@dataclass
class Summary:
    """A step in numbers."""

    where: str
    rewards: list[float] = field(default_factory=list)
    components: dict[str, list[float]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    by_group: dict[str, list[float]] = field(default_factory=dict)
    finishes: Counter[str] = field(default_factory=Counter)
    versions: set[int] = field(default_factory=set)
    failures: int = 0

    def take(self, cells: Mapping[str, Any]) -> None:
        self.rewards.append(cells["reward"])
        self.lengths.append(cells["length"] - cells["prompt_length"])
        self.by_group.setdefault(cells["group"], []).append(cells["reward"])
        self.finishes[cells["finish"]] += 1
        self.failures += cells["failure"] is not None
        self.versions |= {cells[name] for name in ("oldest_version", "newest_version") if cells[name] is not None}
        for name, value in cells.items():
            if name.startswith(REWARD) and value is not None:
                self.components.setdefault(name.removeprefix(REWARD), []).append(value)

    @property
    def equal_groups(self) -> int:
        """Groups whose samples all have the same reward: they teach nothing."""
        return sum(len(set(rewards)) == 1 for rewards in self.by_group.values())

    @property
    def mean_reward(self) -> float:
        return float(np.mean(self.rewards))

    @property
    def spread(self) -> float:
        return float(np.std(self.rewards))


def summaries(reader: BankReader) -> list[Summary]:
    """One for each step, and one for what waits and what goes on. Of sealed steps the small columns alone are read."""
    found: list[Summary] = []
    for number in reader.steps():
        with reader.step(number) as sealed:
            small = ["group", *PLAN_COLUMNS, *(f"{REWARD}{name}" for name in sealed.reward_names)]
            found.append(_summary(f"step {number}", sealed.cells(small)))
    for where, groups in (("waiting", reader.waiting()), ("carried", reader.carried())):
        found.append(_summary(where, _cells(groups, None)))
    return [summary for summary in found if summary.rewards]


def require_texts(found: Mapping[str, Any], names: Iterable[str]) -> None:
    """Texts are kept, or were decoded."""
    if any(found.get(name) is None for name in names):
        raise BankError(
            f"group {found['group']} is kept without its texts. Give the model's tokenizer with "
            "--tokenizer, or set bank.texts=true."
        )


def _summary(where: str, rows: Iterable[Mapping[str, Any]]) -> Summary:
    summary = Summary(where)
    for cells in rows:
        summary.take(cells)
    return summary


def _cells(groups: Iterator[Group], decode: Decode | None) -> Iterator[dict[str, Any]]:
    for group in groups:
        for index in range(len(group.samples)):
            yield cells_of_sample(group, index, decode)


def _with_texts(cells: dict[str, Any], decode: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    if decode is None or cells.get("response_text") is not None or "tokens" not in cells:
        return cells
    start = cells["prompt_length"]
    texts = (decode(cells["tokens"][:start].tolist()), decode(cells["tokens"][start:].tolist()))
    return cells | dict(zip(TEXTS, texts, strict=True))

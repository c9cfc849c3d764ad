"""From a sealed step of the bank to sequences that can be learned from.

Every rank reads the small columns of all rows, from which advantages over whole groups follow and minibatches and packs are
planned; of the rest it reads its own rows alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_rl.objectives.advantages import Advantage, zero_advantage_groups
from megatron_rl.objectives.gtpo import CONFLICT, conflict_columns
from megatron_rl.types import Sample
from megatron_rl.types import Sequence as TokenSequence

ROLLOUT = "rollout"  # the column of the engine's log-probs
TURN = "turn"  # the column of turn numbers
ROUTING_KIND = "routing_dtype"  # the bank's column that is empty where there is no routing, and small


class Rows(Protocol):
    """What is needed of a sealed step."""

    @property
    def reward_names(self) -> list[str]: ...
    def plan(self) -> Any: ...
    def columns(self, names: Sequence[str]) -> Any: ...
    def samples(self, indices: Sequence[int], *, routing: bool = ...) -> list[Sample]: ...


@dataclass(frozen=True)
class Experience:
    """What all ranks know of a step: one entry a row of the bank."""

    rows: Rows
    names: Sequence[str]  # of the groups, by number
    groups: NDArray[np.int64]  # [rows] number of the row's group in the step
    lengths: NDArray[np.int64]  # [rows] tokens
    loss_tokens: NDArray[np.int64]  # [rows] tokens that count
    rewards: NDArray[np.float64]  # [rows] the weighted sum of components
    components: Mapping[str, NDArray[np.float64]]  # [rows] each; nan where a row has none of the name
    turn_rewards: Sequence[Sequence[float]]  # of each row's turns

    @classmethod
    def read(cls, rows: Rows) -> Self:
        """The small columns alone."""
        table = rows.plan()
        names = table.column("group").to_pylist()
        number = {name: place for place, name in enumerate(dict.fromkeys(names))}
        return cls(
            rows=rows,
            names=list(number),
            groups=np.array([number[name] for name in names], dtype=np.int64),
            lengths=table.column("length").to_numpy().astype(np.int64),
            loss_tokens=table.column("loss_tokens").to_numpy().astype(np.int64),
            rewards=table.column("reward").to_numpy().astype(np.float64),
            components={name: _floats(table.column(f"reward_{name}")) for name in rows.reward_names},
            turn_rewards=rows.columns(["turn_rewards"]).column("turn_rewards").to_pylist(),
        )

    @property
    def group_count(self) -> int:
        return int(self.groups.max()) + 1 if len(self.groups) else 0

    def minibatches(self, count: int, seed: Sequence[int]) -> list[NDArray[np.int64]]:
        """Rows dealt to `count` minibatches: whole groups, in an order drawn from the seed, as many groups to each."""
        if count > self.group_count:
            raise ValueError(f"{self.group_count} groups cannot be dealt to {count} minibatches: each needs whole groups")
        order = np.random.default_rng(list(seed)).permutation(self.group_count)
        return [np.flatnonzero(np.isin(self.groups, part)) for part in np.array_split(order, count)]

    def of_first_groups(self, rows: NDArray[np.int64], count: int) -> dict[int, str]:
        """The rows among these that belong to their first so many groups, with the groups' names."""
        chosen = set(sorted(set(self.groups[rows].tolist()))[:count])
        return {int(row): self.names[self.groups[row]] for row in rows if int(self.groups[row]) in chosen}

    def without_routing(self) -> float:
        """Share of rows that the bank has no routing of."""
        column = self.rows.columns([ROUTING_KIND]).column(ROUTING_KIND)
        return column.null_count / max(len(column), 1)

    def sequences(self, rows: Sequence[int], *, routing: bool = False) -> list[TokenSequence]:
        """Read rows of the bank: tokens, what the engine said of them, and if asked for the experts it chose."""
        return [self._sequence(row, sample) for row, sample in zip(rows, self.rows.samples(rows, routing=routing), strict=True)]

    def _sequence(self, row: int, sample: Sample) -> TokenSequence:
        return TokenSequence(
            index=int(row),
            tokens=sample.tokens,
            loss_mask=sample.loss_mask,
            columns={ROLLOUT: sample.log_probs, TURN: _turns(sample)},
            scalars={"reward": float(self.rewards[row])},
            group=int(self.groups[row]),
            routing=sample.routing,
        )

    def metrics(self, step: int) -> dict[str, float]:
        """What the step's samples are like, before anything is learned. Divisors are samples.

        Weights of version n have learned from n steps, so samples for step n by weights v are n − v updates old.
        """
        table = self.rows.plan()
        finish = np.array(table.column("finish").to_pylist())
        failed = [failure is not None for failure in table.column("failure").to_pylist()]
        oldest = [step - version for version in table.column("oldest_version").to_pylist() if version is not None]
        found = {
            "reward/mean": float(self.rewards.mean()),
            "reward/std": float(self.rewards.std()),
            "response/tokens": float(self.loss_tokens.mean()),
            "response/longest": float(self.loss_tokens.max()),
            "response/cut_off": float(np.isin(finish, ["length", "budget"]).mean()),
            "sample/failed": float(np.mean(failed)),
            "staleness/mean": float(np.mean(oldest)) if oldest else 0.0,
            "staleness/max": float(max(oldest, default=0)),
        }
        for name, values in self.components.items():
            found[f"reward/{name}"] = float(np.nanmean(values)) if not np.isnan(values).all() else 0.0
        return found


@dataclass(frozen=True)
class Advantages:
    """What each row gets: one number, or one for each of its turns."""

    values: NDArray[np.float64]  # [rows]
    by_turn: Sequence[NDArray[np.float64]] | None = None
    columns: Mapping[str, Sequence[NDArray[np.float32]]] = field(default_factory=dict)  # a column of each row, by name

    def inform(self, sequence: TokenSequence) -> TokenSequence:
        """The sequence with its advantage."""
        scalars = {**sequence.scalars, "advantage": float(self.values[sequence.index])}
        given = {name: columns[sequence.index] for name, columns in self.columns.items()}
        sequence = replace(sequence, scalars=scalars, columns={**sequence.columns, **given})
        if self.by_turn is None:
            return sequence
        own = self.by_turn[sequence.index]
        turns = sequence.columns[TURN].astype(np.int64)  # [length], −1 where no policy wrote
        table = np.append(own, 0.0)  # the last for tokens of turns that were never rewarded, and of no turn
        spread = table[np.where((turns >= 0) & (turns < len(own)), turns, len(own))].astype(np.float32)
        return replace(sequence, columns={**sequence.columns, "token_advantage": spread})

    def with_conflicts(self, experience: Experience) -> "Advantages":
        """GTPO compares the tokens of whole groups: every rank reads those of the step, and keeps a column a row."""
        samples = experience.rows.samples(range(len(experience.lengths)), routing=False)
        columns = conflict_columns(
            [torch.from_numpy(sample.tokens) for sample in samples],
            [torch.from_numpy(sample.loss_mask) for sample in samples],
            torch.from_numpy(self.values),
            torch.from_numpy(experience.groups),
        )
        return replace(self, columns={CONFLICT: [column.numpy() for column in columns]})

    def metrics(self, experience: Experience) -> dict[str, float]:
        return {
            "advantage/abs_mean": float(np.abs(self.values).mean()),
            "advantage/zero_groups": zero_advantage_groups(torch.from_numpy(self.values), torch.from_numpy(experience.groups)),
        }


def advantages_of(advantage: Advantage, experience: Experience, rewards: NDArray[np.float64]) -> Advantages:
    """Advantages over whole groups. `rewards` are the step's, after penalties that change them."""
    groups, lengths = torch.from_numpy(experience.groups), torch.from_numpy(experience.loss_tokens)
    if advantage.per_turn:
        by_turn = _by_turn(advantage, experience)
        return Advantages(np.array([turns.mean() if len(turns) else 0.0 for turns in by_turn]), by_turn)
    given: torch.Tensor | dict[str, torch.Tensor] = torch.from_numpy(rewards)
    if advantage.by_component:
        missing = [name for name, values in experience.components.items() if np.isnan(values).any()]
        if missing or not experience.components:
            raise ValueError(
                f"advantage {advantage.name} standardises each named reward by itself, and "
                + (f"some samples have no reward {missing[0]}" if missing else "the samples have no named rewards")
            )
        given = {name: torch.from_numpy(values) for name, values in experience.components.items()}
    return Advantages(advantage(given, groups, lengths).double().numpy())


def _by_turn(advantage: Advantage, experience: Experience) -> list[NDArray[np.float64]]:
    """Each row's turns, compared with the same turn of the group's other samples."""
    places = [(row, turn) for row, given in enumerate(experience.turn_rewards) for turn in range(len(given))]
    owners, turns = (np.array(column, dtype=np.int64) for column in (zip(*places, strict=True) if places else ((), ())))
    flat = np.array([reward for given in experience.turn_rewards for reward in given], dtype=np.float64)
    groups = torch.from_numpy(experience.groups[owners])
    found = advantage(torch.from_numpy(flat), groups, torch.ones(len(flat)), torch.from_numpy(turns)).double().numpy()
    return [found[owners == row] for row in range(len(experience.lengths))]


def _turns(sample: Sample) -> NDArray[np.float32]:
    """[length] the turn of each token that a policy wrote, else −1."""
    turns = np.full(sample.length, -1.0, dtype=np.float32)
    for segment in sample.segments:
        if segment.author == "policy":
            turns[segment.start : segment.stop] = segment.turn
    return turns


def _floats(column: Any) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)

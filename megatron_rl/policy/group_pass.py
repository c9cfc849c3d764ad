"""The pass before an update whose objective looks at whole groups: what sequences have to know of one another.

A group's samples lie in different packs and on different model replicas. Each sequence is scored with the current weights, a
few numbers of each are gathered over the replicas, the objective turns the table into scalars, and each sequence gets its own.
Only rows of numbers cross ranks, one a sequence: never anything with an entry a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.objectives.base import GroupObjective, GroupTable
from megatron_rl.policy.policy import Policy
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence

OWN = 5  # columns of a row before the statistics: index, group, tokens that count, reward, advantage


def prepare_groups(
    policy: Policy,
    packs: Sequence[Pack],
    objective: GroupObjective,
    columns: Mapping[str, Sequence[Tensor]] | None = None,
) -> list[Pack]:
    """The packs with the scalars that the objective's update reads. Give `update` these packs and the same `columns`.

    The packs of all replicas are one optimizer step and hold whole groups. Sequences need a `group` and the scalar `reward`,
    and `advantage` where the objective reads it. What comes back holds for the current weights: call it before each update.
    """
    names, rows = _gathered(policy, packs, objective, columns)
    scalars = {name: values.cpu().numpy() for name, values in objective.prepare(_table(rows, names)).items()}
    place = {int(index): i for i, index in enumerate(rows[:, 0])}

    def informed(sequence: TokenSequence) -> TokenSequence:
        given = {name: float(values[place[sequence.index]]) for name, values in scalars.items()}
        return replace(sequence, scalars={**sequence.scalars, **given})

    return [replace(pack, sequences=tuple(informed(sequence) for sequence in pack.sequences)) for pack in packs]


def gather_statistics(
    policy: Policy,
    packs: Sequence[Pack],
    objective: GroupObjective,
    columns: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, dict[int, float]]:
    """What the objective measures of each sequence, by name and by the sequence's index, of all replicas."""
    names, rows = _gathered(policy, packs, objective, columns)
    return {
        name: dict(zip(rows[:, 0].astype(int).tolist(), rows[:, OWN + place].tolist(), strict=True))
        for place, name in enumerate(names)
    }


def _gathered(
    policy: Policy,
    packs: Sequence[Pack],
    objective: GroupObjective,
    columns: Mapping[str, Sequence[Tensor]] | None,
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Names of the statistics, and a row for each sequence of all replicas: OWN columns, then the statistics."""
    sequences = [sequence for pack in packs for sequence in pack.sequences]
    names: tuple[str, ...] = ()
    numbers: list[dict[str, NDArray[np.float64]]] = []
    for batch in policy.observe(packs, objective, columns):
        with torch.no_grad():
            statistics = objective.statistics(batch)
        names = tuple(sorted(statistics))
        numbers.append({name: statistics[name].double().cpu().numpy() for name in names})
    own = [[s.index, _group(s), s.loss_tokens, _reward(s), s.scalars.get("advantage", np.nan)] for s in sequences]
    mine = np.array(own, dtype=np.float64).reshape(len(sequences), OWN)
    if policy.layout.sees_loss:
        measured = [np.concatenate([n[name] for n in numbers]) for name in names]
        mine = np.column_stack([mine, *measured])  # [sequences of this replica, OWN + statistics]
    gathered = np.concatenate(policy.layout.replicas_have(mine)) if policy.layout.sees_loss else mine
    names, rows = policy.layout.object_from_last_stage((names, gathered))
    return names, rows[rows[:, 0].argsort()]  # [N, OWN + statistics]


def _table(rows: NDArray[np.float64], names: Sequence[str]) -> GroupTable:
    index, groups, lengths, rewards, advantages, *statistics = torch.from_numpy(rows).unbind(1)  # [N] each
    if len(index.unique()) != len(index):
        raise ValueError("two sequences of the step have the same index; a sequence's index must be its own in the step")
    return GroupTable(
        groups=groups.long(),
        rewards=rewards,
        lengths=lengths,
        statistics=dict(zip(names, statistics, strict=True)),
        advantages=None if advantages.isnan().any() else advantages,
    )


def _group(sequence: TokenSequence) -> int:
    if sequence.group is None:
        raise ValueError(
            f"sequence {sequence.index} belongs to no group, and the objective compares the responses of a group. "
            "Give every sequence the number of its prompt: Sequence(..., group=...)."
        )
    return sequence.group


def _reward(sequence: TokenSequence) -> float:
    if "reward" not in sequence.scalars:
        raise ValueError(
            f"sequence {sequence.index} has no scalar 'reward' (it has {sorted(sequence.scalars)}), and the objective reads "
            "rewards of whole groups. Put it into Sequence.scalars."
        )
    return sequence.scalars["reward"]

"""Looking at what a step did, now and then: one more pass, after the updates, over what was learned from.

It shows where experts' tokens go and how many choices the updates changed, and, for a few groups, each token's log-ratio and
which sequences the objective clipped: those with an advantage and without a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.objectives.base import Objective, TokenBatch
from megatron_rl.observe.records import SequenceTrace
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.routing_watch import RoutingWatch
from megatron_rl.types import Pack


@dataclass(frozen=True)
class Look:
    """What was seen. The same on every rank, but for the traces, which only the main one has."""

    metrics: Mapping[str, float]
    expert_tokens: NDArray[np.int64] | None
    traces: Sequence[SequenceTrace]


def look(
    policy: Policy,
    objective: Objective,
    packs: Sequence[Pack],
    columns: Mapping[str, Sequence[Tensor]],
    before: RoutingWatch | None,
    traced: Mapping[int, str],
) -> Look:
    """Of one minibatch. `before` watched the pass of the old log-probs; `traced` names the groups of the rows to be traced."""
    with policy.watching() as after:
        batches = policy.observe(packs, objective, columns)
    metrics: dict[str, float] = {}
    tokens = None
    experts = policy.architecture.experts
    if experts is not None:
        tokens = after.tokens(policy.layout, experts.count)
        metrics["moe/max_over_mean"] = float((tokens.max(1) / np.maximum(tokens.mean(1), 1e-9)).max())
        if before is not None:
            metrics["moe/routing_changed"] = before.changed(after, policy.layout)
    return Look(metrics, tokens, _traces(policy, objective, packs, batches, traced))


def _traces(
    policy: Policy, objective: Objective, packs: Sequence[Pack], batches: Sequence[TokenBatch], traced: Mapping[int, str]
) -> list[SequenceTrace]:
    """Every rank takes part, also those with none of the sequences."""
    log_ratios = [
        torch.where(batch.mask, batch.log_probs - batch.columns.get("old", batch.log_probs), 0.0) for batch in batches
    ]
    arrays = policy.per_sequence(packs, log_ratios)
    clipped: dict[int, bool] = {}
    for pack, batch in zip(packs, batches, strict=False):
        idle = _without_gradient(objective, batch)
        clipped |= {sequence.index: bool(found) for sequence, found in zip(pack.sequences, idle, strict=False)}
    clipped = policy.layout.object_from_last_stage(clipped)
    own = [
        SequenceTrace(
            row=sequence.index,
            group=traced[sequence.index],
            advantage=sequence.scalars.get("advantage", 0.0),
            ratio=float(np.exp(arrays[sequence.index].sum() / max(sequence.loss_tokens, 1))),
            clipped=clipped[sequence.index],
            log_ratio=arrays[sequence.index],
            token_advantage=sequence.columns.get("token_advantage"),
        )
        for pack in packs
        for sequence in pack.sequences
        if sequence.index in traced
    ]
    found = {trace.row: trace for each in policy.layout.main_has(own) for trace in each}
    return [found[row] for row in sorted(found)]


def _without_gradient(objective: Objective, batch: TokenBatch) -> Tensor:
    """[count] bool: sequences that the objective has an advantage for, and takes no gradient of."""
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = objective(replace(batch, log_probs=log_probs)).loss
    (slope,) = torch.autograd.grad(loss, log_probs, allow_unused=True) if loss.requires_grad else (None,)
    slope = torch.zeros_like(log_probs) if slope is None else slope
    with torch.no_grad():
        steep = batch.sum_sequences(slope.abs())  # [count]
    wanted = batch.scalars["advantage"] != 0 if "advantage" in batch.scalars else torch.zeros_like(steep, dtype=torch.bool)
    return wanted & (steep == 0)

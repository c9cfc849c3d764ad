"""Every objective on packs whose sequences are cut over context-parallel ranks. No model: log-probs are random numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_rl.config.layout_map import Alignment
from megatron_rl.config.settings import Settings
from megatron_rl.data.packing import build_pack
from megatron_rl.objectives.base import Divisors, GroupObjective, GroupTable, Objective, ObjectiveResult, TokenBatch
from megatron_rl.objectives.registry import PENALTIES, SURROGATES, WEIGHTS, build_objective
from megatron_rl.policy.batch import PackTensors, local_indices, pack_tensors
from megatron_rl.policy.layout import Launch, Layout
from megatron_rl.policy.reduction import reduce_results
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence

ALIGNMENT = 8  # two pieces for each of four ranks, whatever the number of ranks
CENTRE = -2.0  # of the old log-probs
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "reduce_scatter_tensor",
    "all_to_all_single",
)

# Tokens of a sequence, those of its prompt, and about how far its log-probs have moved since they were old. With four ranks
# some hold many tokens that count and some none, of sequences and of whole packs; one sequence has none anywhere.
PACKS = (
    ((37, 5, 0.5), (9, 8, 3e-4), (64, 60, 0.5), (3, 1, 0.1), (16, 15, 3e-4), (24, 1, 3e-4)),
    ((2, 1, 0.2),),
    ((11, 2, 0.05), (5, 5, 0.1), (30, 4, 1e-3)),
)

VARIANTS: dict[str, dict[str, Any]] = {
    "grpo, dual clip": {"surrogate": "grpo", "options": {"dual_clip": 1.2, "aggregation": "token_mean"}},
    "dhpo by entropy": {"surrogate": "dhpo", "options": {"mixing": "entropy"}},
    "cfpo of sequences": {"surrogate": "cfpo", "options": {"ratio": "sequence"}},
    "sspo with arctan": {"surrogate": "sspo", "options": {"gate": "arctan"}},
    "gtpo as in code": {"surrogate": "gtpo", "options": {"filter": "code", "divide_by_conflicts": True}},
}


def objectives() -> dict[str, Objective]:
    """Every surrogate, some with other options, and every weight and penalty."""
    built = {name: build_objective(name) for name in SURROGATES}
    built |= {name: build_objective(**words) for name, words in VARIANTS.items()}
    built |= {f"weight {name}": build_objective("gspo_token", weights=[(name, {})]) for name in WEIGHTS}
    return built | {
        f"penalty {name}": build_objective("gspo", penalties=[(name, {"coefficient": 0.1})])
        for name, cls in PENALTIES.items()
        if cls.place == "loss"  # type: ignore[attr-defined]
    }


@dataclass(frozen=True)
class Seen:
    """What one rank saw of one objective."""

    loss: float
    metrics: dict[str, float]
    gradients: list[NDArray[np.float32]]  # a pack each, [tokens of the whole pack], zero where other ranks are
    crossed: list[tuple[int, int]]  # of each sum over ranks: its bytes, and the sequences of the pack
    local_tokens: list[int]  # this rank's tokens that count, a pack each


def run_objectives(launch: Launch) -> dict[str, Seen]:
    """All objectives on the same packs, cut over all ranks."""
    settings = Settings.model_validate(
        {"policy": {"config": "no-model"}, "layout": {"context": launch.world_size}, "device": {"kind": "cpu"}}
    )
    layout = Layout.of_initialized_ranks(settings, Layout.open(settings, launch).device, launch)
    packs = [build_pack(sequences, Alignment(ALIGNMENT, ALIGNMENT)) for sequences in make_sequences()]
    return {name: see(objective, packs, layout) for name, objective in objectives().items()}


def make_sequences() -> list[list[TokenSequence]]:
    """Responses in groups of two and three that lie in different packs, with everything that any objective reads."""
    generator = np.random.default_rng(5)
    packs: list[list[TokenSequence]] = []
    for shapes in PACKS:
        packs.append([])
        for length, prompt, spread in shapes:
            index = sum(map(len, packs))
            old = generator.normal(CENTRE, 0.3, length)
            columns = {
                "old": old,
                "new": old + generator.normal(0, spread, length),
                "rollout": old + generator.normal(0, 0.01, length),
                "reference": old + generator.normal(0, 0.3, length),
                "conflict": generator.choice([0.0, 1.0, 2.0, 4.0], length),
                "entropy": generator.uniform(0.1, 1.0, length),
            }
            scalars = {
                "advantage": float(generator.normal()),
                "reward": float(generator.integers(0, 3)),
                "initial_entropy": float(generator.uniform(0.5, 0.9)),
            }
            counted = np.arange(length) >= prompt
            arrays = {name: values.astype(np.float32) for name, values in columns.items()}
            packs[-1].append(TokenSequence(index, np.zeros(length, np.int64), counted, arrays, scalars, group=index % 4))
    return packs


def see(objective: Objective, packs: Sequence[Pack], layout: Layout) -> Seen:
    """One step of the objective, its groups prepared when it reads them."""
    everyone = [sequence for pack in packs for sequence in pack.sequences]
    divisors = Divisors(sum(s.loss_tokens > 0 for s in everyone), sum(s.loss_tokens for s in everyone))
    names = tuple(everyone[0].columns), tuple(everyone[0].scalars)
    tensors = [pack_tensors(pack, layout, *names) for pack in packs]
    batches = [token_batch(pack, layout, divisors) for pack in tensors]
    crossed: list[tuple[int, int]] = []
    if getattr(objective, "reads_groups", False):
        batches = prepared(cast(GroupObjective, objective), batches, everyone, crossed)
    results: list[ObjectiveResult] = []
    gradients: list[NDArray[np.float32]] = []
    for flat, pack, given in zip(packs, tensors, batches, strict=True):
        with watched(crossed, given.count):
            result = objective(given)
            if result.loss.requires_grad:
                result.loss.backward()
        results.append(replace(result, loss=result.loss.detach()))
        whole = torch.zeros(pack.tokens.numel() * layout.settings.context)
        slopes = given.log_probs.grad
        whole[torch.from_numpy(local_indices(flat, layout))] = torch.zeros_like(given.log_probs) if slopes is None else slopes
        gradients.append(whole.numpy())
    loss, metrics = reduce_results(results, layout)
    return Seen(loss, metrics, gradients, crossed, [int(pack.mask.sum()) for pack in tensors])


def token_batch(pack: PackTensors, layout: Layout, divisors: Divisors) -> TokenBatch:
    """What a policy would show, with something that is no number outside the mask."""
    values = {name: torch.where(pack.mask, column, torch.nan) for name, column in pack.columns.items()}
    return TokenBatch(
        log_probs=values["new"].requires_grad_(),
        mask=pack.mask,
        segments=pack.segments,
        lengths=pack.lengths,
        columns={name: column for name, column in values.items() if name not in ("new", "entropy")},
        scalars=pack.scalars,
        divisors=divisors,
        sum_sequences=lambda values: pack.sum_sequences(values, layout.sum_over_context),
        entropy=values["entropy"],
    )


def prepared(
    objective: GroupObjective, batches: list[TokenBatch], sequences: list[TokenSequence], crossed: list[tuple[int, int]]
) -> list[TokenBatch]:
    """The two passes of a loss over groups; every rank of the replica holds all of its statistics."""
    statistics: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        with torch.no_grad(), watched(crossed, batch.count):
            statistics.append(objective.statistics(batch))
    table = GroupTable(
        groups=torch.tensor([sequence.group for sequence in sequences]),
        rewards=torch.tensor([sequence.scalars["reward"] for sequence in sequences]),
        lengths=torch.cat([batch.lengths for batch in batches]),
        statistics={name: torch.cat([given[name] for given in statistics]) for name in statistics[0]},
        advantages=torch.tensor([sequence.scalars["advantage"] for sequence in sequences]),
    )
    counts = [batch.count for batch in batches]
    parts = {name: values.float().split(counts) for name, values in objective.prepare(table).items()}
    return [
        replace(batch, scalars={**batch.scalars, **{name: values[i] for name, values in parts.items()}})
        for i, batch in enumerate(batches)
    ]


@contextmanager
def watched(crossed: list[tuple[int, int]], count: int) -> Iterator[None]:
    """Note the bytes of every tensor that is summed over ranks meanwhile, beside `count`; other collectives fail."""
    true_ones = {name: getattr(dist, name) for name in ("all_reduce", *COLLECTIVES)}

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        crossed.append((tensor.numel() * tensor.element_size(), count))
        return true_ones["all_reduce"](tensor, *arguments, **named)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an objective used another collective than the sum over ranks")

    try:
        dist.all_reduce = all_reduce
        for name in COLLECTIVES:
            setattr(dist, name, refuse)
        yield
    finally:
        for name, function in true_ones.items():
            setattr(dist, name, function)

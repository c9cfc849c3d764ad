"""Routing replay under every layout: each rank repeats its tokens and its layers, and the result is that of one rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_rl.config.settings import Settings
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.policy.batch import local_indices
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy, UpdateReport
from megatron_rl.policy.routing_replay import Differences, Routes
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence
from tests.parallel.cluster import Cluster
from tests.parallel.jobs import Arrays, gradients, toy_sequences
from tests.parallel.test_layouts import TOLERANCE, worst
from tests.policy.test_routing_replay import shake, with_routing
from tests.reference.tiny import write_tiny_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "pipeline 2, uneven, recomputed": (
        2,
        {"layout": {"pipeline": 2, "pipeline_layers": [1, 3]}, "recompute": {"mode": "full"}},
    ),
    "pipeline 2, virtual 2, experts recomputed": (
        2,
        {"layout": {"pipeline": 2, "virtual_pipeline": 2}, "recompute": {"mode": "selective", "modules": ["moe"]}},
    ),
    "context 2": (2, {"layout": {"context": 2}}),
    "tensor 2, sequence parallel, recomputed": (2, {"layout": {"tensor": 2}, "recompute": {"mode": "full"}}),
    "expert 2": (2, {"layout": {"expert": 2}}),
    "expert 2, allgather": (2, {"layout": {"expert": 2}, "moe": {"dispatcher": "allgather"}}),
    "tensor 2, context 2, expert 2": (4, {"layout": {"tensor": 2, "context": 2, "expert": 2}}),
    "tensor 2, pipeline 2, expert 2, recomputed": (
        4,
        {"layout": {"tensor": 2, "pipeline": 2, "expert": 2}, "recompute": {"mode": "full"}},
    ),
}


@dataclass(frozen=True)
class Replayed:
    """What replayed passes saw, the same whatever the layout."""

    routing: dict[tuple[int, int, int], tuple[int, ...]]  # experts that were written down, by sequence, position and layer
    log_probs: dict[int, NDArray[np.float32]]  # of shaken routers that repeat them
    differences: list[Differences]  # of each pass
    losses: list[float]
    grad_norms: list[float]
    gradients: Arrays  # of the first update
    bytes: int  # of all ranks


def replay(launch: Launch, settings: dict[str, Any], sequences: list[TokenSequence], given: bool) -> Replayed | None:
    """Score with given routing or the policy's own, shake the routers, and take two updates that repeat it. On rank 0."""
    policy = Policy.open(Settings(**settings), launch)
    packs = policy.pack(with_routing(policy, sequences) if given else sequences)
    with policy.replaying(policy.rollout_routes(packs) if given else None, record=True) as first:
        old = {"old": [values.log_probs for values in policy.log_probs(packs)]}
    differences = [first.differences(policy.layout)]
    shake(policy)
    with policy.replaying(first.routes):
        log_probs = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
    reports: list[UpdateReport] = []
    of_first: Arrays = {}
    for number in range(2):
        with policy.replaying(first.routes) as update:
            reports.append(policy.update(packs, SequencePolicyLoss(clip_low=0.9, clip_high=9.0), old))
        differences.append(update.differences(policy.layout))
        of_first = of_first if number else gradients(policy)
    everyone: list[Any] = [None] * launch.world_size
    own = (by_place(policy, packs, first.routes), log_probs, sum(routes.bytes for routes in first.routes))
    dist.all_gather_object(everyone, own)
    places = [place for chosen, _, _ in everyone for place in chosen]
    assert len(places) == len(set(places)), "two ranks hold the same"
    return Replayed(
        {place: experts for chosen, _, _ in everyone for place, experts in chosen.items()},
        {index: values for _, found, _ in everyone for index, values in found.items()},
        differences,
        [report.loss for report in reports],
        [report.grad_norm for report in reports],
        of_first,
        sum(held for _, _, held in everyone),
    )


def by_place(policy: Policy, packs: list[Pack], routes: list[Routes]) -> dict[tuple[int, int, int], tuple[int, ...]]:
    """This rank's experts by sequence, position and layer; padding is left out."""
    found = {}
    for pack, own in zip(packs, routes, strict=True):
        flat = policy.layout.sequence_part(torch.from_numpy(local_indices(pack, policy.layout))).tolist()
        starts = np.cumsum([0, *pack.padded_lengths])
        for place, position in enumerate(flat):
            number = int(np.searchsorted(starts, position, side="right")) - 1
            if number < len(pack.sequences) and position - starts[number] < pack.sequences[number].length:
                for layer, experts in own.experts.items():
                    key = (pack.sequences[number].index, int(position - starts[number]), layer)
                    found[key] = tuple(experts[place].tolist())
    return found


def run(cluster: Cluster, folder: Path, ranks: int, sections: dict[str, Any], given: bool) -> Replayed:
    settings: dict[str, Any] = {
        "policy": {"config": write_tiny_config("deepseek_v3", folder), "seed": 1},
        "precision": {"dtype": "float32"},
        "optimizer": {"lr": 1e-3, "eps": 1e-3},
        "batch": {"max_tokens": 64},
        **sections,
    }
    arguments = {"settings": settings, "sequences": toy_sequences(0, 11, 120, 40), "given": given}
    found: Replayed = cluster.run("tests.parallel.test_replay:replay", ranks, **arguments)[0]
    return found


@pytest.fixture(scope="module")
def references(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Replayed]:
    return {given: run(cluster, tmp_path_factory.mktemp("one"), 1, {}, given) for given in (False, True)}


def test_one_rank_is_told_what_it_would_not_choose(references: dict[bool, Replayed]) -> None:
    tokens = sum(sequence.length for sequence in toy_sequences(0, 11, 120, 40))
    assert {layer for _, _, layer in references[False].routing} == {1, 2, 3}
    for given, found in references.items():
        assert len(found.routing) == tokens * 3 and all(len(set(experts)) == 4 for experts in found.routing.values())
        assert [each.tokens for each in found.differences] == [(tokens - 11 * given) * 3, tokens * 3, tokens * 3]
        first, *updates = (each.shares("")["differs"] for each in found.differences)
        assert (first > 0.9 if given else first == 0) and min(updates) > 0.1


@pytest.mark.parametrize("given", [False, True], ids=["own", "rollout"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_do_not_matter(
    name: str, given: bool, cluster: Cluster, references: dict[bool, Replayed], tmp_path: Path
) -> None:
    expected, actual = references[given], run(cluster, tmp_path, *LAYOUTS[name], given)
    # Last tokens choose by themselves, where a near tie may go either way; nothing else may.
    assert actual.routing.keys() == expected.routing.keys()
    assert sum(set(actual.routing[place]) != set(experts) for place, experts in expected.routing.items()) <= 1
    for index, log_probs in expected.log_probs.items():
        np.testing.assert_allclose(actual.log_probs[index], log_probs, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=TOLERANCE, atol=1e-6)
    np.testing.assert_allclose(actual.grad_norms, expected.grad_norms, rtol=TOLERANCE)
    assert worst(actual.gradients, expected.gradients)[0] < (TOLERANCE,)
    for ours, theirs in zip(actual.differences, expected.differences, strict=True):
        assert (ours.tokens, ours.choices) == (theirs.tokens, theirs.choices)
        assert abs(ours.tokens_differing - theirs.tokens_differing) <= 2  # near ties
        assert abs(ours.choices_differing - theirs.choices_differing) <= 2
    assert actual.bytes < 2 * expected.bytes  # each rank holds its part, and padding

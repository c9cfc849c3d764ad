"""Routing replay under every layout: each rank repeats its tokens and its layers, and the result is that of one rank."""

from bisect import bisect_right
from collections.abc import Iterator
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
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.routing_replay import Differences, Routes
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence
from tests.parallel.cluster import Cluster
from tests.parallel.jobs import Arrays, gradients, toy_sequences
from tests.parallel.test_layouts import TOLERANCE, worst
from tests.policy.test_routing_replay import shake, with_routing
from tests.reference.tiny import write_tiny_config

type Place = tuple[str, int, int, int]  # whose routing, sequence, position, layer

SEQUENCES = toy_sequences(0, 11, 120, 40)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pipeline 2, uneven, recomputed": (
        2,
        {"layout": {"pipeline": 2, "pipeline_layers": [3, 1]}, "recompute": {"mode": "full"}},
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
    """What passes saw that repeat the policy's own routing, and one that dice threw; the same whatever the layout."""

    routing: dict[Place, tuple[int, ...]]  # experts that were written down
    log_probs: dict[tuple[str, int], NDArray[np.float32]]  # of shaken routers that repeat them, by sequence
    differences: dict[str, list[Differences]]  # of the pass that wrote them down, and of an update
    losses: list[float]
    grad_norms: list[float]
    gradients: Arrays  # of the first update
    bytes: int  # of all ranks


def replay(launch: Launch, settings: dict[str, Any], sequences: list[TokenSequence]) -> Replayed:
    """Score with both routings, shake the routers, and take an update that repeats each."""
    policy = Policy.open(Settings(**settings), launch)
    packs = policy.pack(with_routing(policy, sequences))
    given = {"own": None, "rollout": policy.rollout_routes(packs)}
    routes: dict[str, list[Routes]] = {}
    old, differences = {}, {}
    for kind in given:
        with policy.replaying(given[kind], record=True) as first:
            old[kind] = {"old": [values.log_probs for values in policy.log_probs(packs)]}
        routes[kind], differences[kind] = first.routes, [first.differences(policy.layout)]
    shake(policy)
    log_probs: dict[tuple[str, int], NDArray[np.float32]] = {}
    of_first: Arrays = {}
    reports = []
    for kind in given:
        with policy.replaying(routes[kind]):
            found = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
        log_probs |= {(kind, index): values for index, values in found.items()}
        with policy.replaying(routes[kind]) as update:
            reports.append(policy.update(packs, SequencePolicyLoss(clip_low=0.9, clip_high=9.0), old[kind]))
        differences[kind].append(update.differences(policy.layout))
        of_first = of_first or gradients(policy)
    everyone: list[Any] = [None] * launch.world_size
    places = {place: experts for kind in routes for place, experts in by_place(policy, packs, routes[kind], kind)}
    dist.all_gather_object(everyone, (places, log_probs, sum(each.bytes for kind in routes for each in routes[kind])))
    held = [place for chosen, _, _ in everyone for place in chosen]
    assert len(held) == len(set(held)), "two ranks hold the same"
    return Replayed(
        {place: experts for chosen, _, _ in everyone for place, experts in chosen.items()},
        {key: values for _, scored, _ in everyone for key, values in scored.items()},
        differences,
        [report.loss for report in reports],
        [report.grad_norm for report in reports],
        of_first,
        sum(size for _, _, size in everyone),
    )


def by_place(policy: Policy, packs: list[Pack], routes: list[Routes], kind: str) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """This rank's experts; padding is left out."""
    for pack, own in zip(packs, routes, strict=True):
        flat = policy.layout.sequence_part(torch.from_numpy(local_indices(pack, policy.layout))).tolist()
        starts = np.cumsum([0, *pack.padded_lengths]).tolist()
        for row, position in enumerate(flat):
            number = bisect_right(starts, position) - 1
            if number < len(pack.sequences) and position - starts[number] < pack.sequences[number].length:
                for layer, experts in own.experts.items():
                    yield (kind, pack.sequences[number].index, position - starts[number], layer), tuple(experts[row].tolist())


def run(cluster: Cluster, folder: Path, ranks: int, sections: dict[str, Any]) -> Replayed:
    settings: dict[str, Any] = {
        "policy": {"config": write_tiny_config("deepseek_v3", folder), "seed": 1},
        "precision": {"dtype": "float32"},
        "optimizer": {"lr": 1e-3, "eps": 1e-3},
        "batch": {"max_tokens": 64},
        **sections,
    }
    found: Replayed = cluster.run("tests.parallel.test_replay:replay", ranks, settings=settings, sequences=SEQUENCES)[0]
    return found


@pytest.fixture(scope="module")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    return run(cluster, tmp_path_factory.mktemp("one"), 1, {})


def test_one_rank_is_told_what_it_would_not_choose(reference: Replayed) -> None:
    tokens = sum(sequence.length for sequence in SEQUENCES)
    assert {layer for *_, layer in reference.routing} == {1, 2, 3}
    assert len(reference.routing) == 2 * tokens * 3 and all(len(set(each)) == 4 for each in reference.routing.values())
    (recorded, own), (dice, rollout) = reference.differences["own"], reference.differences["rollout"]
    assert recorded.tokens == 0  # it was told nothing
    assert dice.tokens == (tokens - len(SEQUENCES)) * 3 and own.tokens == rollout.tokens == tokens * 3
    assert own.shares("")["differs"] > 0.05 and dice.shares("")["differs"] > 0.9 and rollout.shares("")["differs"] > 0.8


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_do_not_matter(name: str, cluster: Cluster, reference: Replayed, tmp_path: Path) -> None:
    actual = run(cluster, tmp_path, *LAYOUTS[name])
    assert actual.routing.keys() == reference.routing.keys()
    # Where routers choose by themselves, a near tie may go either way.
    assert sum(set(actual.routing[place]) != set(experts) for place, experts in reference.routing.items()) <= 1
    for key, log_probs in reference.log_probs.items():
        np.testing.assert_allclose(actual.log_probs[key], log_probs, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(actual.losses, reference.losses, rtol=TOLERANCE, atol=1e-6)
    np.testing.assert_allclose(actual.grad_norms, reference.grad_norms, rtol=TOLERANCE)
    assert worst(actual.gradients, reference.gradients)[0] < (TOLERANCE,)
    for kind, expected in reference.differences.items():
        for ours, theirs in zip(actual.differences[kind], expected, strict=True):
            assert (ours.tokens, ours.choices) == (theirs.tokens, theirs.choices)
            assert abs(ours.tokens_differing - theirs.tokens_differing) <= 2
            assert abs(ours.choices_differing - theirs.choices_differing) <= 2
    assert actual.bytes < 2 * reference.bytes  # each rank holds its part, and padding

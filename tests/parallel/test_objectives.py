"""Every objective over 2 and 4 context-parallel ranks, some with empty shards, equals one rank; gradient included."""

import numpy as np
import pytest

from tests.parallel.cluster import Cluster
from tests.parallel.objective_jobs import PACKS, Seen, objectives

RANKS = (2, 4)
FLOAT32 = 4  # bytes
MOST_EXCHANGES = 6  # a pack: what the surrogate and its weight need (dhpo by entropy: 3), shares of clips, the perplexity
TOLERANCE = 2e-5  # float32 sums of up to a few dozen numbers, in another order


@pytest.fixture(scope="module")
def seen(cluster: Cluster) -> dict[int, list[dict[str, Seen]]]:
    """What every rank saw, by the number of ranks."""
    return {ranks: cluster.run("tests.parallel.objective_jobs:run_objectives", ranks) for ranks in (1, *RANKS)}


@pytest.mark.parametrize("ranks", RANKS)
def test_shards_are_uneven_and_some_are_empty(ranks: int, seen: dict[int, list[dict[str, Seen]]]) -> None:
    tokens = np.array([rank["gspo"].local_tokens for rank in seen[ranks]])  # [ranks, packs]
    assert tokens.shape == (ranks, len(PACKS))
    assert (tokens == 0).any()
    assert all(len(set(of_pack)) > 1 for of_pack in tokens.T)


@pytest.mark.parametrize("name", objectives())
@pytest.mark.parametrize("ranks", RANKS)
def test_context_parallel_changes_nothing(ranks: int, name: str, seen: dict[int, list[dict[str, Seen]]]) -> None:
    alone = seen[1][0][name]
    assert any(gradient.any() for gradient in alone.gradients)
    together = [rank[name] for rank in seen[ranks]]
    for rank in together:
        assert rank.loss == pytest.approx(alone.loss, rel=TOLERANCE, abs=1e-7)
        assert rank.metrics == pytest.approx(alone.metrics, rel=TOLERANCE, abs=1e-7)
    for pack, expected in enumerate(alone.gradients):
        gradient = np.sum([rank.gradients[pack] for rank in together], axis=0)  # each token is on one rank
        np.testing.assert_allclose(gradient, expected, rtol=TOLERANCE, atol=TOLERANCE * max(np.abs(expected).max(), 1e-6))


@pytest.mark.parametrize("ranks", RANKS)
def test_only_one_number_a_sequence_crosses_ranks(ranks: int, seen: dict[int, list[dict[str, Seen]]]) -> None:
    for rank in seen[ranks]:
        for name, objective in rank.items():
            assert objective.crossed, name
            wrong = [(size, count) for size, count in objective.crossed if size != FLOAT32 * count]
            assert not wrong, f"{name} summed {wrong} bytes over ranks, for so many sequences"


@pytest.mark.parametrize("ranks", RANKS)
def test_metrics_cost_hardly_an_exchange(ranks: int, seen: dict[int, list[dict[str, Seen]]]) -> None:
    """Sums over tokens are added up over ranks once a step, with those of other replicas, and not pack by pack."""
    for rank in seen[ranks]:
        exchanges = {name: len(objective.crossed) / len(PACKS) for name, objective in rank.items()}
        assert exchanges["gspo"] == 2  # its ratio, and the perplexity
        assert {name: count for name, count in exchanges.items() if count > MOST_EXCHANGES} == {}

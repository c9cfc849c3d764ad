"""What travels between ranks, planned: each rank plans its own part of what all would plan, and counts what it has alike."""

from collections import defaultdict
from math import prod

import pytest
import torch

from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import rank_coordinates
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.weights.gather import plan_gather
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.live import LiveWeights
from tests.reference.tiny import write_tiny_config

LAYOUTS = [
    (LayoutSettings(), 1),
    (LayoutSettings(tensor=2, expert=2, pipeline=2), 8),
    (LayoutSettings(tensor=2, context=2, expert=4), 8),
    (LayoutSettings(expert=2, expert_tensor=2), 16),
]


@pytest.fixture(scope="module")
def weight_map(tmp_path_factory: pytest.TempPathFactory) -> WeightMap:
    return WeightMap(read_architecture(write_tiny_config("qwen3_moe", tmp_path_factory.mktemp("model"))))


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_a_rank_plans_its_own_part(weight_map: WeightMap, layout: LayoutSettings, ranks: int) -> None:
    """In the order of the whole plan: sender and receiver of a message lay it out alike. Whole tensors arrive."""
    names = tuple(weight_map.hf)
    wanted = [dict.fromkeys(range(0, ranks, 2), names), {rank: names[rank::ranks] for rank in range(ranks)}]
    whole = plan_gather(weight_map, layout, ranks, wanted)
    for each, asked in zip(whole, wanted, strict=True):
        arriving: dict[tuple[int, str], int] = defaultdict(int)
        for move in each.moves:
            arriving[move.target, move.hf] += prod(move.hf_box[1])
        assert arriving == {(rank, name): weight_map.hf[name].numbers for rank, own in asked.items() for name in own}
    for rank in range(ranks):
        own = plan_gather(weight_map, layout, ranks, wanted, rank)
        expected = [[move for move in each.moves if rank in (move.source, move.target)] for each in whole]
        assert [list(each.moves) for each in own] == expected


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
def test_what_ranks_have_at_hand(weight_map: WeightMap, layout: LayoutSettings, ranks: int) -> None:
    """Counted rank by rank, as slowly as can be."""
    expected: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for place in rank_coordinates(layout, ranks):
        for held in weight_map.held(layout, place):
            for piece in weight_map.pieces(held.rule.megatron, held.box):
                expected[piece.hf][place.rank] += prod(piece.hf_box[1])
    assert LiveWeights(weight_map, layout, ranks, list, torch.float32, torch.device("cpu")).shares() == expected

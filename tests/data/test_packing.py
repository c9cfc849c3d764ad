"""Packing: every sequence exactly once, nothing over its limit, work spread evenly, lengths alone decide."""

import itertools
import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.architecture import Architecture, Experts, LatentAttention, Rope
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.layout_map import Alignment
from megatron_rl.data.packing import CostModel, Plan, build_packs, plan_packs
from megatron_rl.types import Sequence

COST = CostModel(linear=1.0, quadratic=0.02)
UNALIGNED = Alignment(sequence=1, pack=1)

alignments = st.builds(Alignment, sequence=st.sampled_from([1, 2, 4, 6]), pack=st.sampled_from([1, 8, 16]))
lengths_lists = st.lists(st.integers(1, 200), max_size=60)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded(length: int, alignment: Alignment) -> int:
    return round_up(length, alignment.sequence)


def costs_of(lengths: list[int], alignment: Alignment = UNALIGNED, cost: CostModel = COST) -> list[float]:
    return [cost.linear * tokens + cost.quadratic * tokens**2 for tokens in (padded(length, alignment) for length in lengths)]


def rank_costs(plan: Plan, costs: list[float]) -> list[float]:
    return [sum(costs[position] for pack in rank for position in pack) for rank in plan]


def sequence(index: int, length: int) -> Sequence:
    return Sequence(index, np.arange(length, dtype=np.int64), np.zeros(length, dtype=np.bool_))


def contents(plan: Plan, lengths: list[int]) -> list[list[list[int]]]:
    """The plan with lengths in place of positions, and without the order inside a pack."""
    return [[sorted(lengths[position] for position in pack) for pack in rank] for rank in plan]


def fewest_bins(sizes: list[int], capacity: int) -> int:
    """Exact bin packing by exhaustive search: each size into each open bin or a new one."""

    def search(remaining: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not remaining:
            return len(rooms)
        size, *rest = remaining
        options = [search(tuple(rest), (*rooms, capacity - size))]
        for index, room in enumerate(rooms):
            if room >= size:
                options.append(search(tuple(rest), (*rooms[:index], room - size, *rooms[index + 1 :])))
        return min(options)

    return search(tuple(sizes), ())


@settings(max_examples=300)
@given(lengths_lists, st.integers(1, 5), alignments, st.integers(0, 300), st.integers(1, 3))
def test_a_plan_holds_each_sequence_once_within_its_limits(
    lengths: list[int], data_parallel: int, alignment: Alignment, slack: int, multiple_of: int
) -> None:
    max_tokens = round_up(max(lengths, default=1), math.lcm(alignment.sequence, alignment.pack)) + slack
    plan = plan_packs(
        lengths, data_parallel=data_parallel, max_tokens=max_tokens, alignment=alignment, cost=COST, multiple_of=multiple_of
    )

    assert len(plan) == data_parallel
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) % multiple_of == 0
    assert sorted(position for rank in plan for pack in rank for position in pack) == list(range(len(lengths)))

    sequences = [sequence(index, length) for index, length in enumerate(lengths)]
    for rank, rank_packs in zip(plan, build_packs(sequences, plan, alignment), strict=True):
        for pack, built in zip(rank, rank_packs, strict=True):
            assert tuple(one.index for one in built.sequences) == pack
            assert len(built.padded_lengths) == max(1, len(pack))
            assert all(length % alignment.sequence == 0 for length in built.padded_lengths)
            assert all(room >= one.length for one, room in zip(built.sequences, built.padded_lengths, strict=False))
            assert 0 < built.tokens <= max_tokens
            assert built.tokens % alignment.pack == 0
            least = sum(padded(one.length, alignment) for one in built.sequences)
            assert built.tokens - least < math.lcm(alignment.sequence, alignment.pack) or not pack


@settings(max_examples=200)
@given(lengths_lists, st.integers(1, 5), alignments, st.integers(0, 300), st.randoms(use_true_random=False))
def test_lengths_alone_decide(lengths: list[int], data_parallel: int, alignment: Alignment, slack: int, random: Random) -> None:
    max_tokens = round_up(max(lengths, default=1), math.lcm(alignment.sequence, alignment.pack)) + slack

    def plan(of: list[int]) -> Plan:
        return plan_packs(of, data_parallel=data_parallel, max_tokens=max_tokens, alignment=alignment, cost=COST)

    shuffled = random.sample(lengths, len(lengths))
    assert plan(lengths) == plan(list(lengths))
    assert contents(plan(shuffled), shuffled) == contents(plan(lengths), lengths)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 3))
def test_ranks_differ_by_at_most_one_sequence_where_capacity_does_not_bind(
    lengths: list[int], data_parallel: int, multiple_of: int
) -> None:
    plan = plan_packs(
        lengths, data_parallel=data_parallel, max_tokens=sum(lengths), alignment=UNALIGNED, cost=COST, multiple_of=multiple_of
    )
    costs = costs_of(lengths)
    ranks = rank_costs(plan, costs)
    assert len(plan[0]) == multiple_of
    assert max(ranks) <= sum(ranks) / data_parallel + max(costs) * (1 + 1e-9)
    assert max(ranks) - min(ranks) <= max(costs) * (1 + 1e-9)
    for rank in plan:  # and so do the packs of a rank
        packs = [sum(costs[position] for position in pack) for pack in rank]
        assert max(packs) - min(packs) <= max(costs) * (1 + 1e-9)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_two_ranks_are_as_even_as_exhaustive_search_finds_to_a_sixth(lengths: list[int]) -> None:
    """Graham's bound for longest-first on two ranks is 7/6 of the optimum; trades only lower it."""
    costs = costs_of(lengths)
    plan = plan_packs(lengths, data_parallel=2, max_tokens=sum(lengths), alignment=UNALIGNED, cost=COST)
    optimum = min(
        max(sum(itertools.compress(costs, chosen)), sum(costs) - sum(itertools.compress(costs, chosen)))
        for chosen in itertools.product([0, 1], repeat=len(costs))
    )
    assert max(rank_costs(plan, costs)) <= optimum * 7 / 6 * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(40, 60), alignments)
def test_packs_are_as_few_as_exhaustive_search_finds(lengths: list[int], max_tokens: int, alignment: Alignment) -> None:
    """Best-fit decreasing needs six sequences to err at all, and then stays within its bound of 11/9 + 6/9."""
    multiple = math.lcm(alignment.sequence, alignment.pack)
    capacity = max(max_tokens // multiple * multiple, round_up(max(lengths), multiple))
    plan = plan_packs(lengths, data_parallel=1, max_tokens=capacity, alignment=alignment, cost=COST)
    optimum = fewest_bins([padded(length, alignment) for length in lengths], capacity)
    assert len(plan[0]) <= (optimum if len(lengths) <= 5 else (11 * optimum + 6) / 9)


def test_a_sequence_goes_where_it_fits_best() -> None:
    """40 joins 60: with 50, where there is more room, it would leave the last two without."""
    plan = plan_packs([60, 50, 40, 30, 20], data_parallel=1, max_tokens=100, alignment=UNALIGNED, cost=COST)
    assert sorted(plan[0]) == [(0, 2), (1, 3, 4)]


def test_few_long_sequences_need_the_tight_packing() -> None:
    """Dealing 50, 50, 34, 33, 33 to the lightest pack leaves no room for the last; 50+50 and 34+33+33 fit exactly."""
    lengths = [33, 50, 34, 33, 50]
    plan = plan_packs(lengths, data_parallel=2, max_tokens=100, alignment=UNALIGNED, cost=COST)
    assert sorted(contents(plan, lengths)) == [[[33, 33, 34]], [[50, 50]]]


def test_trades_mend_what_longest_first_leaves_uneven() -> None:
    """Longest first deals 3+2+2 and 3+2; swapping a 3 for a 2 makes both 6. Between ranks, and inside one."""
    lengths, linear = [3, 3, 2, 2, 2], CostModel(linear=1.0, quadratic=0.0)
    ranks = plan_packs(lengths, data_parallel=2, max_tokens=12, alignment=UNALIGNED, cost=linear)
    assert contents(ranks, lengths) == [[[2, 2, 2]], [[3, 3]]]
    one_rank = plan_packs(lengths, data_parallel=1, max_tokens=12, alignment=UNALIGNED, cost=linear, multiple_of=2)
    assert contents(one_rank, lengths) == [[[2, 2, 2], [3, 3]]]


def test_the_trade_that_closes_the_gap_best_is_made() -> None:
    """Longest first leaves 10+6+5 and 9+7+1; swapping 7 and 5 makes 19 each, the lesser swaps on offer end at 20 and 18."""
    lengths = [1, 5, 6, 7, 9, 10]
    plan = plan_packs(lengths, data_parallel=2, max_tokens=38, alignment=UNALIGNED, cost=CostModel(linear=1.0, quadratic=0.0))
    assert rank_costs(plan, [float(length) for length in lengths]) == [19, 19]


def log_normal(count: int) -> list[int]:
    return np.clip(np.random.default_rng(0).lognormal(7.6, 0.8, count), 64, 32000).astype(int).tolist()


def uniform(count: int) -> list[int]:
    return np.random.default_rng(0).integers(256, 32000, count).tolist()


@pytest.mark.parametrize(
    ("lengths", "data_parallel", "spare_micro_batches", "rank_excess", "wait_excess"),
    [
        pytest.param(log_normal(4096), 64, 0, 0.002, 0.095, id="one sequence outweighs 1.5 packs"),
        pytest.param(log_normal(16384), 64, 0, 0.001, 0.04, id="many packs"),
        pytest.param(uniform(512), 16, 1, 0.002, 0.016, id="few packs"),
        pytest.param(uniform(4096), 16, 1, 0.001, 0.01, id="no slack while packing"),
        pytest.param(uniform(48), 16, 0, 0.02, 0.33, id="three sequences a rank"),
    ],
)
def test_realistic_batches_are_packed_tightly_and_evenly(
    lengths: list[int], data_parallel: int, spare_micro_batches: int, rank_excess: float, wait_excess: float
) -> None:
    """The cost of a 235B-A22B model over what no plan can beat: micro-batches over tokens / capacity, the busiest rank over
    the mean (ranks that meet once a step), and the sum over n of the heaviest n-th pack over the mean (that meet in each)."""
    alignment, cost = Alignment(8, 16), CostModel(linear=44e9, quadratic=1.54e6)
    plan = plan_packs(lengths, data_parallel=data_parallel, max_tokens=32768, alignment=alignment, cost=cost)
    costs = costs_of(lengths, alignment, cost)
    packs = np.array([[sum(costs[position] for position in pack) for pack in rank] for rank in plan])  # [rank, micro-batch]
    least = math.ceil(sum(padded(length, alignment) for length in lengths) / data_parallel / 32768)
    assert packs.shape[1] <= least + spare_micro_batches
    mean = packs.sum() / data_parallel
    assert packs.sum(1).max() <= (1 + rank_excess) * mean
    assert packs.max(0).sum() <= (1 + wait_excess) * mean


def test_heavier_packs_run_first() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 200).tolist()
    plan = plan_packs(lengths, data_parallel=4, max_tokens=1500, alignment=UNALIGNED, cost=COST)
    costs = costs_of(lengths)
    assert len(plan[0]) > 5
    for rank in plan:
        packs = [sum(costs[position] for position in pack) for pack in rank]
        assert packs == sorted(packs, reverse=True)


def test_no_sequence_makes_no_micro_batch() -> None:
    assert plan_packs([], data_parallel=3, max_tokens=64, alignment=UNALIGNED, cost=COST, multiple_of=4) == [[], [], []]


def test_ranks_without_a_sequence_get_an_empty_pack_of_padding() -> None:
    alignment = Alignment(sequence=4, pack=6)
    plan = plan_packs([5, 9], data_parallel=4, max_tokens=24, alignment=alignment, cost=COST)
    assert Counter(pack for rank in plan for pack in rank) == {(0,): 1, (1,): 1, (): 2}
    built = build_packs([sequence(0, 5), sequence(1, 9)], plan, alignment)
    lengths = {tuple(one.length for one in pack.sequences): pack.padded_lengths for rank in built for pack in rank}
    assert lengths == {(5,): (12,), (9,): (12,), (): (12,)}


def test_only_the_last_sequence_takes_the_padding_of_the_pack() -> None:
    built = build_packs([sequence(0, 5), sequence(1, 9)], [[(0, 1)]], Alignment(sequence=4, pack=16))
    assert built[0][0].padded_lengths == (8, 24)


def test_a_sequence_that_fits_nowhere_is_named() -> None:
    with pytest.raises(
        SettingsError, match=r"sequence 2 has 61 tokens \(64 padded.*holds 56: batch\.max_tokens=60 .*2 of 4"
    ) as error:
        plan_packs([7, 56, 61, 90], data_parallel=2, max_tokens=60, alignment=Alignment(8, 8), cost=COST)
    assert "Raise batch.max_tokens" in str(error.value)


def test_a_length_below_one_is_named() -> None:
    with pytest.raises(ValueError, match="sequence 1 has length 0"):
        plan_packs([7, 0], data_parallel=2, max_tokens=60, alignment=UNALIGNED, cost=COST)


DENSE = Architecture(
    family="qwen3", layers=3, hidden=8, heads=4, kv_heads=2, head_dim=5, ffn_hidden=11, vocab=13, max_positions=64,
    norm_eps=1e-6, rope=Rope(1e4), tied_embeddings=False,
)  # fmt: skip
EXPERTS = Experts(
    count=6, top_k=2, hidden=7, scoring="softmax", normalize_top_k=True, softmax_before_top_k=True, shared_hidden=9
)
LATENT = LatentAttention(q_lora_rank=6, kv_lora_rank=4, qk_head_dim=3, qk_rope_head_dim=2, v_head_dim=5)


def matrices(*shapes: tuple[int, int]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def test_cost_model_counts_every_product_of_a_dense_model() -> None:
    layer = matrices((8, 20), (8, 10), (8, 10), (20, 8), (8, 11), (8, 11), (11, 8))
    model = CostModel.of(DENSE)
    assert model == CostModel(linear=2 * (3 * layer + 8 * 13), quadratic=3 * 4 * (5 + 5))
    assert model.cost(np.array([1, 10])).tolist() == [model.linear + model.quadratic, 10 * model.linear + 100 * model.quadratic]


def test_cost_model_counts_active_experts_and_latent_attention() -> None:
    attention = matrices((8, 6), (6, 4 * 5), (8, 4 + 2), (4, 4 * (3 + 5)), (4 * 5, 8))
    dense = matrices((8, 11), (8, 11), (11, 8))
    sparse = matrices((8, 6), *2 * ((8, 7), (8, 7), (7, 8)), (8, 9), (8, 9), (9, 8))
    architecture = Architecture(
        **{**vars(DENSE), "experts": EXPERTS, "moe_layers": (False, True, True), "latent_attention": LATENT}
    )
    weights = 3 * attention + dense + 2 * sparse + 8 * 13
    assert CostModel.of(architecture) == CostModel(linear=2 * weights, quadratic=3 * 4 * (3 + 2 + 5))

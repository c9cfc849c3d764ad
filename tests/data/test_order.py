"""The order of prompts: every row once an epoch, weights exact, and nothing but the position to save."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.errors import DataError
from megatron_rl.data.order import Interleave, epoch_order, hashes, held_out


@settings(max_examples=50)
@given(st.integers(0, 500), st.text(max_size=5), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_holds_every_row_once(rows: int, source: str, seed: int, epoch: int) -> None:
    order = epoch_order(rows, source, seed, epoch)
    assert sorted(order.tolist()) == list(range(rows))
    assert np.array_equal(order, epoch_order(rows, source, seed, epoch))


def test_orders_differ_by_source_seed_and_epoch_and_stay_for_good() -> None:
    orders = [epoch_order(100, *which).tolist() for which in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))]
    assert len(set(map(tuple, orders))) == 4
    # A saved position means the same prompt with every later version of this program.
    assert epoch_order(10, "a", 0, 0).tolist() == [1, 0, 3, 8, 6, 2, 9, 7, 4, 5]


def splitmix64(state: int) -> int:
    """One step, from the paper's C, in integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_hashes_are_splitmix64() -> None:
    start = int.from_bytes(hashlib.blake2b(b"x/3", digest_size=8).digest(), "little")
    expected = [splitmix64((start + row * 0x9E3779B97F4A7C15) % 2**64) for row in range(50)]
    assert hashes(50, "x", 3).tolist() == expected


def test_every_row_is_as_likely_at_every_place() -> None:
    places = np.array([epoch_order(5, "a", seed, 0) for seed in range(4000)])
    counts = np.array([np.bincount(places[:, place], minlength=5) for place in range(5)])
    assert (np.abs(counts - 800) < 5 * 26).all()  # five standard deviations of a binomial


@settings(max_examples=50)
@given(st.integers(1, 1000), st.floats(0, 0.99), st.floats(0, 0.99))
def test_validation_takes_its_share_and_a_larger_share_holds_a_smaller(rows: int, one: float, other: float) -> None:
    small, large = sorted((one, other))
    few, many = held_out(rows, "a", small), held_out(rows, "a", large)
    assert few.sum() == round(rows * small) and (many | few).sum() == many.sum() == round(rows * large)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 5))
def test_weights_are_exact_over_every_period(weights: list[int], turn: int) -> None:
    interleave = Interleave.of(weights)
    period = interleave.period
    drawn = [interleave.at(position) for position in range(turn * period, (turn + 1) * period)]
    assert Counter(source for source, _ in drawn) == dict(enumerate(interleave.weights))
    total = sum(weights)
    assert all(own * total == weight * period for own, weight in zip(interleave.weights, weights, strict=True))
    # Evenly spread: at no moment is a source a whole turn ahead or behind by more than others force it to be.
    seen: Counter[int] = Counter()
    for place, (source, occurrence) in enumerate(drawn, 1):
        assert occurrence == turn * interleave.weights[source] + seen[source]
        seen[source] += 1
        for other, weight in enumerate(interleave.weights):
            assert abs(seen[other] - place * weight / period) < max(1.0, len(weights) / 2)


def test_weights_are_taken_as_written() -> None:
    assert Interleave.of([0.7, 0.2, 0.1]).weights == (7, 2, 1)
    assert Interleave.of([7473, 7473]).weights == (1, 1)
    with pytest.raises(DataError, match="have no common measure"):
        Interleave.of([0.123456789, 1])

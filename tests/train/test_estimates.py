"""avg, pass and maj of k against what enumeration of all draws says."""

from itertools import combinations, permutations
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as some

from megatron_rl.train.estimates import draws, majority, pass_at

OUTCOMES = some.lists(some.booleans(), min_size=1, max_size=9)
VOTES = some.lists(some.tuples(some.sampled_from([None, "1", "2", "3"]), some.booleans()), min_size=1, max_size=6)


@given(OUTCOMES)
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(right: list[bool]) -> None:
    for k in draws(len(right)):
        enumerated = fmean(any(drawn) for drawn in combinations(right, k))
        assert pass_at(len(right), sum(right), k) == pytest.approx(enumerated, abs=1e-12)


def test_one_draw_is_the_mean_and_all_draws_are_any() -> None:
    assert pass_at(8, 3, 1) == pytest.approx(3 / 8)
    assert [pass_at(8, right, 8) for right in (0, 1, 8)] == [0, 1, 1]
    for k in (0, 9):
        with pytest.raises(ValueError, match="k is from 1 to 8"):
            pass_at(8, 3, k)


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_draws_are_powers_of_two_and_all(count: int, expected: list[int]) -> None:
    assert draws(count) == expected


@given(VOTES)
def test_a_majority_is_what_counting_in_every_order_gives(votes: list[tuple[str | None, bool]]) -> None:
    """Count ballots one by one and take the first answer that reaches the most: over all orders, ties fall as by lot."""

    def counted(order: tuple[tuple[str | None, bool], ...]) -> bool:
        tally: dict[str, int] = {}
        best, chosen = 0, False
        for answer, _ in order:
            if answer is not None:
                tally[answer] = tally.get(answer, 0) + 1
        most = max(tally.values(), default=0)
        for answer, right in order:  # the first ballot for a most-wanted answer decides
            if answer is not None and tally[answer] == most and not best:
                best, chosen = most, right
        return chosen

    answers, right = [answer for answer, _ in votes], [ok for _, ok in votes]
    assert majority(answers, right) == pytest.approx(fmean(counted(order) for order in permutations(votes)), abs=1e-12)


def test_who_gives_no_answer_has_no_vote() -> None:
    assert majority([None, None, "7"], [False, False, True]) == 1
    assert majority([None, None], [True, True]) == 0
    assert majority(["7", "8"], [True, False]) == 0.5
    assert majority(["7", "7", "8"], [True, False, True]) == 0.5  # of those that say 7, one has a right reward

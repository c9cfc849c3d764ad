"""format and length: what counts as well built and as the right length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rewards.base import ComputedReward, RewardError
from megatron_rl.rewards.registry import make
from tests.rewards.samples import computed, prompt, sample

RIGHT = "<think>hm\n</think>\n<answer>4</answer>\n"
TAGS = {"tags": ["think", "answer"]}


@pytest.mark.parametrize(
    "text, whole, part",
    [
        (RIGHT, 1, 1),
        (f"So: {RIGHT}", 0, 1),
        (f"{RIGHT} Done.", 0, 1),
        ("<answer>4</answer><think>hm</think>", 0, 1),
        ("<think>hm<answer>4</answer></think>", 0, 1),
        ("<think>a</think><think>b</think><answer>4</answer>", 0, 0.5),
        ("<think>hm</think><answer>4", 0, 0.5),
        ("</think><think><answer>4</answer>", 0, 0.5),
        ("", 0, 0),
    ],
)
def test_tags_stand_once_in_order_with_nothing_around(text: str, whole: float, part: float) -> None:
    assert computed("format", text, TAGS) == whole
    assert computed("format", text, {**TAGS, "partial": True}) == part


def test_a_pattern_is_matched_by_the_whole_response() -> None:
    assert computed("format", "a\n1", {"pattern": r"a.\d"}) == 1
    assert computed("format", "a\n1\n", {"pattern": r"a.\d"}) == 0


@given(st.integers(0, 60), st.integers(0, 30), st.integers(1, 30), st.integers(1, 40))
def test_length_is_full_within_bounds_and_fades_evenly_outside(length: int, low: int, more: int, fade: int) -> None:
    high = low + more
    distance = low - length if length < low else length - high if length > high else 0
    expected = max(0, 1 - distance / fade)
    options = {"low": low, "high": high, "fade": fade}
    assert computed("length", "x" * length, options) == pytest.approx(expected)
    assert computed("length", "x" * length, {**options, "in_characters": True}) == pytest.approx(expected)
    assert computed("length", "x" * length, {"low": low, "budget": "room", "fade": fade}, room=str(high)) == pytest.approx(
        expected
    )


def test_length_counts_tokens_that_are_learned_from_and_characters_of_what_is_judged() -> None:
    reward = make("length", {"high": 3, "fade": 10})
    assert isinstance(reward, ComputedReward)
    episode = sample("draft", "four", learned=[False, True], environment="result")
    assert reward.score(prompt(), "four", episode) == pytest.approx(0.9)


def test_a_budget_that_is_no_number_is_the_samples_failure() -> None:
    with pytest.raises(RewardError, match="column 'room' holds no whole number: 'much'"):
        computed("length", "x", {"budget": "room"}, room="much")

"""exact, numeric, regex, set_f1: against simple implementations of the same, and their bad input."""

import re
import string
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rewards.answers import extract, last_box, last_boxes, last_number, number
from megatron_rl.rewards.base import RewardError
from tests.rewards.samples import computed

WORDS = st.text(alphabet=string.ascii_letters + string.digits + " .,\t", max_size=20)


# -- where the answer stands -------------------------------------------------------------------------------------------


@given(
    st.recursive(st.text("ab\\ $", max_size=4).filter(lambda t: not t.endswith("\\")), lambda inner: inner.map("{{{}}}".format))
)
def test_the_last_box_is_found_whatever_balanced_braces_it_holds(content: str) -> None:
    assert last_box(f"first \\boxed{{0}}, so \\boxed{{{content}}} is it. {{}}") == content


@pytest.mark.parametrize("text", ["", "42", "\\boxed{1", "\\boxed{\\frac{1}{2}", "boxed{1}"])
def test_no_box_is_none(text: str) -> None:
    assert last_box(text) is None


def test_boxes_that_stand_together_are_several_answers() -> None:
    assert last_boxes(r"\boxed{0}. So $x = \boxed{1}$: $\boxed{2}$, \boxed{{3}} and $\boxed{4}$.") == ["2", "{3}", "4"]
    assert last_boxes(r"\boxed{\boxed{3}}") == ["3"] and last_boxes(r"\boxed{1}\boxed{2") == ["1"]


def test_an_unfinished_box_does_not_hide_a_finished_one() -> None:
    assert last_box(r"\boxed{7} and then \boxed{8") == "7"


@given(st.fractions(), st.sampled_from(["{}", "x = {}", "from 3 to {}", "It is {}.", "costs ${} now"]))
def test_the_last_number_is_found(value: Fraction, frame: str) -> None:
    found = last_number(frame.format(value))
    assert found is not None and number(found) == pytest.approx(float(value))


@pytest.mark.parametrize(
    "text, value",
    [
        ("1,234.5", 1234.5),
        ("$12", 12),
        ("50%", 50),
        ("-3e-2", -0.03),
        ("−7", -7),
        (" .5 ", 0.5),
        ("3.", 3),
        ("6/-4", -1.5),
        ("1/0", None),
        ("1/2/3", None),
        ("12 apples", None),
        ("", None),
        ("1e999", None),
        ("9" * 5000, None),
        ("nan", None),
        ("1,23", None),
    ],
)
def test_numbers(text: str, value: float | None) -> None:
    assert number(text) == value


def test_a_range_has_no_negative_end() -> None:
    assert last_number("pages 3-7") == "7" and last_number("it fell to -7") == "-7"


def test_extraction_looks_behind_the_last_marker_only() -> None:
    text = "<think>12</think> no, <think>13</think> I say\n14 or 15 "
    assert extract(text, after="</think>", place="last_number", pattern=None) == "15"
    assert extract(text, after="</think>", place="last_line", pattern=None) == "14 or 15 "
    assert extract(text, after="</think>", place="all", pattern=r"(\d+) or") == "14"
    assert extract(text, after="</think>", place="all", pattern="or [0-9]+") == "or 15"
    assert extract(text, after="</thought>", place="all", pattern=None) is None
    assert extract("\n \n", after=None, place="last_line", pattern=None) is None


# -- exact -------------------------------------------------------------------------------------------------------------


@given(WORDS, WORDS, st.booleans(), st.booleans(), st.booleans())
def test_exact_is_equality_of_what_counts(left: str, right: str, case: bool, space: bool, punctuation: bool) -> None:
    def plain(text: str) -> str:
        text = text.lower() if case else text
        text = "".join(letter for letter in text if letter not in ".,") if punctuation else text
        return re.sub(r"\s+", " ", text).strip() if space else text

    options = {"ignore_case": case, "ignore_space": space, "ignore_punctuation": punctuation}
    assert computed("exact", left, options, answer=right) == (plain(left) == plain(right))
    assert computed("exact", left, options, answer=left) == 1


def test_exact_takes_any_of_several_answers() -> None:
    assert computed("exact", " Paris ", answer=["Lutetia", "Paris"]) == 1
    assert computed("exact", "Paris", answer=["Rome"]) == 0
    assert computed("exact", "7", answer=7) == 1
    assert computed("exact", "no marker", {"after": "Answer:"}, answer="no marker") == 0


def test_a_missing_column_says_what_there_is() -> None:
    with pytest.raises(RewardError, match="prompt source/1 has no column 'answer'; it has solution"):
        computed("exact", "7", solution="7")


# -- numeric -----------------------------------------------------------------------------------------------------------


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_numeric_is_equality_of_whole_numbers_however_they_are_written(said: int, right: int) -> None:
    options = {"relative": 0.0}
    for written in (f"{said}", f"{said:,}", f"{said}.000", f"I get 17 apples, so {said:,}."):
        assert computed("numeric", written, options, answer=right) == (said == right)
        assert computed("numeric", written, options, answer=f"17 is wrong. #### {right:,}") == (said == right)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1), st.floats(0, 1))
def test_numeric_tolerances(said: float, right: float, absolute: float, relative: float) -> None:
    near = abs(said - right) <= absolute or abs(said - right) <= relative * abs(right)
    assert computed("numeric", repr(said), {"absolute": absolute, "relative": relative}, answer=right) == near


def test_numeric_without_a_number() -> None:
    assert computed("numeric", "no idea", answer=3) == 0
    assert computed("numeric", "7/2", answer="3.5") == 1
    with pytest.raises(RewardError, match="column 'answer' holds no number: 'none'"):
        computed("numeric", "3", answer="none")


# -- regex -------------------------------------------------------------------------------------------------------------


def test_regex_matches_anywhere_or_whole_from_settings_or_column() -> None:
    assert computed("regex", "so\nAnswer: 42", {"pattern": r"answer: \d+$", "ignore_case": True}) == 1
    assert computed("regex", "so\nAnswer: 42", {"pattern": r"Answer: \d+", "match": "whole"}) == 0
    assert computed("regex", "a\nb", {"pattern": "a.b", "match": "whole"}) == 1
    assert computed("regex", "a\nb", {"pattern": "a.b", "dot_matches_newline": False}) == 0
    assert computed("regex", "x7", {"column": "wanted"}, wanted=r"\d") == 1
    with pytest.raises(RewardError, match="holds no regular expression"):
        computed("regex", "x7", {"column": "wanted"}, wanted="(")


# -- set_f1 ------------------------------------------------------------------------------------------------------------

ITEMS = st.lists(st.sampled_from(["a", "b", "c", "red fox", "7"]), max_size=6)


@given(ITEMS, ITEMS, st.booleans())
def test_set_f1_is_the_harmonic_mean_of_precision_and_recall(said: list[str], right: list[str], repeats: bool) -> None:
    left, wanted = (Counter(items) if repeats else Counter(dict.fromkeys(items, 1)) for items in (said, right))
    hits = sum(min(left[item], wanted[item]) for item in wanted)
    if not said and not right:
        expected = 1.0
    elif hits == 0:
        expected = 0.0
    else:
        precision, recall = hits / sum(left.values()), hits / sum(wanted.values())
        expected = 2 * precision * recall / (precision + recall)
    for text in (", ".join(said), f"[{';'.join(said)}]", "\n".join(said)):
        for column in (right, ",".join(right)):
            assert computed("set_f1", text, {"count_repeats": repeats}, answer=column) == pytest.approx(expected)

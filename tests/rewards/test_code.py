"""code: programs found in responses, tests as data sets hold them, and what passing is worth."""

import asyncio
import json
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.errors import SettingsError
from megatron_rl.rewards import code
from megatron_rl.rewards.base import RewardError, Scored
from megatron_rl.rewards.cases import Case, assertions, cases, program, same
from megatron_rl.rewards.code import refusals
from megatron_rl.rewards.sandbox.probe import ESSENTIAL, Standing
from megatron_rl.rewards.sandbox.runner import Walls
from tests.rewards.samples import scored

ADD = "a, b = map(int, input().split())\nprint(a + b)"
SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "-5 5", "output": "0"}, {"input": "7 8", "output": "15"}]
WRONG_ONCE = "a, b = map(int, input().split())\nprint(a + b if a > 0 else 7)"


def fenced(text: str, language: str = "python") -> str:
    return f"I think so:\n```{language}\n{text}\n```\nThat is it."


def judge(fields: dict[str, Any], *texts: str, **options: Any) -> list[Scored]:
    limits = {"wall": 30.0, "concurrency": 2, **options}
    return asyncio.run(scored([{"name": "code", "options": limits}], fields, *texts))


# -- the program -------------------------------------------------------------------------------------------------------


def test_the_block_that_is_asked_for_is_the_program() -> None:
    text = f"{fenced('one = 1')}\n{fenced('ls -l', 'bash')}\n{fenced('two = 2', '')}"
    assert program(text, "last") == "two = 2\n" and program(text, "first") == "one = 1\n" and program(text, "whole") == text
    assert program("no block", "last") is None and program("```python\nunfinished", "last") is None
    assert program(fenced("ls", "bash"), "last") is None
    assert program("````py\n```\ninner\n```\n````", "last") == "```\ninner\n```\n"


# -- tests -------------------------------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4)


@given(PAIRS)
def test_all_ways_to_write_tests_are_the_same_tests(pairs: list[tuple[str, str]]) -> None:
    rows = [{"input": left, "output": right} for left, right in pairs]
    columns = {"inputs": [left for left, _ in pairs], "outputs": [right for _, right in pairs]}
    expected = [Case(*pair) for pair in pairs]
    for value in (rows, columns, json.dumps(rows), json.dumps(columns)):
        assert cases(value, "input", "output") == expected
    if len(pairs) == 1:
        assert cases(rows[0], "input", "output") == expected


def test_lines_may_come_as_lists_and_names_are_of_choice() -> None:
    assert cases([{"stdin": ["1", "2"], "want": 3}], "stdin", "want") == [Case("1\n2", "3")]


@pytest.mark.parametrize(
    "value, message",
    [
        ("no json", "no JSON"),
        ([], "there are no tests"),
        (7, "neither a list nor a mapping"),
        ([{"input": "1"}], "a test has no 'output'; it has input"),
        (["1"], "a test is no mapping"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs for 0 outputs"),
    ],
)
def test_tests_that_cannot_be_read_are_told(value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=re.escape(message)):
        cases(value, "input", "output")


def test_assertions_are_texts() -> None:
    assert assertions("assert f(1)\nassert f(2)") == ["assert f(1)\nassert f(2)"]
    assert assertions(["assert f(1)", "assert f(2)"]) == assertions('["assert f(1)", "assert f(2)"]')
    for wrong in ([], [""], [3], "[3]", "[", None):
        with pytest.raises(RewardError):
            assertions(wrong)


# -- what is printed ---------------------------------------------------------------------------------------------------

SPOKEN = st.lists(st.text("ab1", min_size=1, max_size=3), max_size=4)
BLANK = st.text(" \n\t", min_size=1, max_size=3)


@given(
    st.lists(st.text("ab1", min_size=1, max_size=3), max_size=4),
    st.lists(st.text("ab1", min_size=1, max_size=3), max_size=4),
    BLANK,
)
def test_words_are_compared_whatever_stands_between(left: list[str], right: list[str], blank: str) -> None:
    assert same(blank.join(left), " ".join(right), "tokens", 0) == (left == right)
    assert same(blank.join(left) + blank, blank.join(right), "exact", 0) == (blank.join(left) + blank == blank.join(right))


def test_lines_and_numbers() -> None:
    assert same("a \nb\n\n", "a\nb", "lines", 0) and not same("a b", "a\nb", "lines", 0) and not same(" a", "a", "lines", 0)
    assert not same("a\x0cb", "a\nb", "lines", 0) and same("a\r\nb", "a\nb", "lines", 0)
    assert same("0.3333 x", "0.33333333 x", "tokens", 1e-3) and not same("0.3333", "0.34", "tokens", 1e-3)
    assert (
        same("1000001", "1000000", "tokens", 1e-3) and not same("nan", "1", "tokens", 1.0) and not same("x", "y", "tokens", 9)
    )


# -- in the sandbox ----------------------------------------------------------------------------------------------------


def test_programs_are_worth_what_they_pass() -> None:
    texts = [
        fenced(ADD),
        fenced(WRONG_ONCE),
        ADD,
        fenced("while True: pass"),
        fenced("1/0"),
        fenced("print(3"),
        fenced("print(3)"),
    ]
    all_or_none = judge({"tests": SUMS}, *texts, cpu=1)
    assert [answer.failure for answer in all_or_none] == [None] * len(texts)
    assert [answer.reward for answer in all_or_none] == [1, 0, 0, 0, 0, 0, 0]
    parts = judge({"tests": json.dumps(SUMS)}, *texts[:2], texts[-1], score="fraction")
    assert [answer.reward for answer in parts] == [1, pytest.approx(2 / 3), pytest.approx(1 / 3)]
    [first] = judge({"tests": SUMS}, fenced("input(); print(3)"), most_tests=1)
    assert first.reward == 1


def test_a_program_that_crashes_after_the_right_words_has_not_passed() -> None:
    [answer] = judge({"tests": SUMS[:1]}, fenced("print(3)\nraise SystemExit(1)"))
    assert answer.reward == 0


def test_assertions_as_data_sets_hold_them() -> None:
    mbpp = {"tests": ["assert double(2) == 4", "assert double(math.pi) > 6"], "imports": "import math"}
    good, bad = fenced("def double(x): return 2 * x"), fenced("def double(x): return 4")
    answers = judge(mbpp, good, bad, style="assert", before="imports", score="fraction")
    assert [answer.reward for answer in answers] == [1, 0.5]
    human = {"tests": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 6", "entry": "double"}
    answers = judge(human, good, bad, fenced("import os; os._exit(0)"), style="assert", entry_point="entry")
    assert [answer.reward for answer in answers] == [1, 0, 0]


def test_bad_tests_are_the_samples_failure_and_no_programs_fault() -> None:
    [answer] = judge({"tests": "none"}, fenced(ADD))
    assert answer.failure is not None and answer.failure.startswith("code: tests are text and no JSON")
    [answer] = judge({}, fenced(ADD))
    assert answer.failure is not None and "has no column 'tests'" in answer.failure


def test_all_runs_of_a_sample_have_a_limit_together() -> None:
    slow = fenced("import time\ntime.sleep(0.4)\na, b = map(int, input().split())\nprint(a + b)")
    [answer] = judge({"tests": SUMS * 20}, slow, total=1.5, score="fraction")
    assert answer.failure is None and 0 <= answer.reward <= 4 / 60


def test_a_machine_that_cannot_hold_programs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standing is made up here, to be that of a container without namespaces and Landlock."""

    async def poor() -> Standing:
        return Standing(Walls("none", False, True, False), frozenset({"cpu", "memory", "processes", "network", "signals"}), ())

    monkeypatch.setattr(code, "stand", poor)
    with pytest.raises(SettingsError) as refusal:
        judge({"tests": SUMS}, fenced(ADD), scratch=1, processes=2)
    lines = str(refusal.value).splitlines()
    assert [re.findall(r"'(\w+)'", line)[0] for line in lines] == ["writing", "reading", "many_processes", "scratch"]
    assert "Set scratch: 0" in lines[3] and "Set processes: 1" in lines[2] and "unenforced: [writing]" in lines[0]
    [answer] = judge({"tests": SUMS}, fenced(ADD), unenforced=["writing", "reading"])
    assert answer.reward == 1 and answer.failure is None


def test_a_refusal_names_the_limit_its_meaning_and_the_way_out() -> None:
    [line] = refusals(["network"], Walls("none", False, False, True))
    assert "cannot enforce 'network'" in line and "with Landlock, resource limits" in line and "rewards --check" in line


def test_a_sandbox_that_breaks_is_the_samples_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def usual() -> Standing:
        return Standing(Walls("none", False, True, True), frozenset(ESSENTIAL), ())

    monkeypatch.setattr(code, "stand", usual)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # what a keeper shall be started with
    [answer] = judge({"tests": SUMS}, fenced(ADD))
    assert answer.failure is not None and answer.failure.startswith("code: SandboxError: the sandbox ended with 1")

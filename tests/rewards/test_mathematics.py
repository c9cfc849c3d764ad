"""math: as sympy judges it, on pairs whose meaning is written down apart from their LaTeX; and what cannot be read."""

import pytest
import sympy

from megatron_rl.rewards.base import RewardError
from tests.rewards.samples import computed

# LaTeX, and what it means
MEANINGS = [
    (r"\frac{1}{2}", "1/2"),
    ("0.5", "1/2"),
    (r"\frac{2}{4}", "1/2"),
    (r"\dfrac{\sqrt{2}}{2}", "sqrt(2)/2"),
    (r"\frac{1}{\sqrt{2}}", "1/sqrt(2)"),
    (r"2^{10}", "1024"),
    ("1024", "1024"),
    ("1{,}024", "1024"),
    (r"x^2 + 2x + 1", "x**2 + 2*x + 1"),
    (r"(x+1)^2", "(x + 1)**2"),
    (r"x^2 - 1", "x**2 - 1"),
    (r"(x-1)(x+1)", "(x - 1)*(x + 1)"),
    (r"\sin^2 x + \cos^2 x", "sin(x)**2 + cos(x)**2"),
    ("1", "1"),
    (r"\pi", "pi"),
    (r"2\pi", "2*pi"),
    (r"-\frac{3}{4}", "-3/4"),
    ("-0.75", "-3/4"),
    (r"\log 8", "log(8)"),
    (r"3 \log 2", "3*log(2)"),
]
FRAMES = ("The answer is $\\boxed{{{}}}$.", "so ${}$")
PAIRS = [(left, right) for i, left in enumerate(MEANINGS) for right in MEANINGS[max(0, i - 2) : i + 3]]


def test_equal_is_what_sympy_says_is_equal() -> None:
    wrong = []
    for i, ((left, meaning), (right, other)) in enumerate(PAIRS):
        equal = sympy.simplify(sympy.sympify(meaning) - sympy.sympify(other)) == 0
        if computed("math", FRAMES[i % 2].format(left), answer=right) != equal:
            wrong.append((left, right, equal))
    assert not wrong


@pytest.mark.parametrize(
    "text, answer, reward",
    [
        (r"\boxed{3} or maybe 4", "3", 1),
        (r"It is \boxed{3}. No, wait: it must be \boxed{4}", "4", 1),
        (r"$\boxed{3}$, then $\boxed{4}$", "3", 0),
        (r"\boxed{1} and \boxed{2}", "1, 2", 1),
        (r"\boxed{1} and \boxed{2}", "2", 0),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1),
        (r"\boxed{(1, 2)}", "(2, 1)", 0),
        (r"\boxed{x = 5}", "5", 1),
        (r"\boxed{[0, 1)}", "[0, 1]", 0),
        ("the answer is 12", ["11", "12"], 1),
        ("I do not know", "12", 0),
        ("", "12", 0),
        (r"\boxed{", "12", 0),
        (r"\frac{", "12", 0),
    ],
)
def test_answers(text: str, answer: str | list[str], reward: float) -> None:
    assert computed("math", text, answer=answer) == reward


def test_only_what_is_boxed_and_only_after_the_thoughts() -> None:
    thoughts = r"<think>\boxed{7}</think> 7"
    assert computed("math", thoughts, answer="7") == 1
    assert computed("math", thoughts, {"boxed": True}, answer="7") == 1
    assert computed("math", thoughts, {"boxed": True, "after": "</think>"}, answer="7") == 0
    assert computed("math", "7", {"after": "</think>"}, answer="7") == 0


def test_a_right_answer_that_cannot_be_read_is_a_failure() -> None:
    with pytest.raises(RewardError, match="holds nothing that can be read as mathematics"):
        computed("math", "7", answer="")

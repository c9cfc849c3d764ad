"""Answers that are mathematics: equal where they mean the same. By math-verify, which reads LaTeX and asks sympy."""

import logging
from typing import ClassVar

from pydantic import Field, PositiveInt

from megatron_rl.rewards.answers import accepted, last_boxes, last_number
from megatron_rl.rewards.base import ComputedReward, Options, RewardError, TimedOptions, column
from megatron_rl.types import Prompt, Sample


class MathOptions(TimedOptions):
    answer: str = Field("answer", description="Column with the right answer in LaTeX or plain, or with a list of right ones.")
    after: str | None = Field(None, description="Look only behind the last of these, `</think>` say; without it: no answer.")
    boxed: bool = Field(False, description=r"Only what stands in the last \boxed{} counts as the answer.")
    digits: PositiveInt = Field(6, description="Decimals that numbers are compared by.")
    strict: bool = Field(True, description="Variables must have the same names, sets and intervals the same kind.")


class Math(ComputedReward[MathOptions]):
    """1 where the answer is mathematically equal to a right one, else 0. sqrt(2)/2 is 1/sqrt(2)."""

    name: ClassVar[str] = "math"
    takes: ClassVar[type[Options]] = MathOptions
    example: ClassVar[str] = "{name: math, options: {boxed: true, timeout: 5}}"

    def columns(self) -> frozenset[str]:
        return frozenset({self.options.answer})

    def prepare(self) -> None:
        import math_verify  # noqa: F401  # in workers alone: with sympy it takes most of a second

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of the time-outs that we put in other hands
        ways = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
        answer = self._find(text)
        if answer is None:
            return 0.0
        # No time-outs of its own: they are alarms, which stop nothing outside the main thread. A worker is killed.
        given = parse(answer, ways, parsing_timeout=None)
        for right in accepted(column(prompt, self.options.answer)):
            gold = parse(_boxed(", ".join(last_boxes(right)) or right), ways, parsing_timeout=None)
            if not gold:
                raise RewardError(
                    f"column '{self.options.answer}' holds nothing that can be read as mathematics: {right!r:.100}"
                )
            if given and verify(
                gold, given, float_rounding=self.options.digits, strict=self.options.strict, timeout_seconds=None
            ):
                return 1.0
        return 0.0

    def answer(self, text: str) -> str | None:
        """The last box, else the last number: as it is written, for reading mathematics takes a worker that can be killed."""
        if self.options.after is not None:
            _, found, text = text.rpartition(self.options.after)
            if not found:
                return None
        if boxes := last_boxes(text):
            return ", ".join(" ".join(box.split()) for box in boxes)
        return None if self.options.boxed else last_number(text)

    def _find(self, text: str) -> str | None:
        if self.options.after is not None:
            _, found, text = text.rpartition(self.options.after)
            if not found:
                return None
        # The last box is the answer. math-verify would take all boxes of a line for one set of answers.
        if boxes := last_boxes(text):
            return _boxed(", ".join(boxes))
        return None if self.options.boxed else text


def _boxed(text: str) -> str:
    return f"$\\boxed{{{text}}}$"

"""Rewards for the shape of a response rather than for what it says.

The soft penalty on overlong responses of DAPO is a penalty of the objective (`overlong`), not a reward. What an
environment gives for turns is added by the episode.
"""

import re
from itertools import pairwise
from typing import ClassVar, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from megatron_rl.rewards.base import ComputedReward, Options, RewardError, TimedOptions, column
from megatron_rl.rewards.rules import compiled
from megatron_rl.types import Prompt, Sample


class FormatOptions(TimedOptions):
    pattern: str | None = Field(None, description="A regular expression that all of the response must match; dots match lines.")
    tags: tuple[str, ...] = Field(
        (), description="Instead: `<tag>…</tag>` for each of these, once, in this order, nothing around them."
    )
    partial: bool = Field(False, description="With tags: the part of them that stands there once and closed, not all or none.")

    _pattern = field_validator("pattern")(compiled)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.pattern is None) == (not self.tags):
            raise ValueError("needs either `pattern` or `tags`")
        if self.partial and not self.tags:
            raise ValueError("`partial` counts tags, and there are none")
        return self


class Format(ComputedReward[FormatOptions]):
    """1 where the response is built as asked, else 0."""

    name: ClassVar[str] = "format"
    takes: ClassVar[type[Options]] = FormatOptions
    example: ClassVar[str] = "{name: format, weight: 0.1, options: {tags: [think, answer]}}"

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        if self.options.pattern is not None:
            return float(re.fullmatch(self.options.pattern, text, re.DOTALL) is not None)
        places = [self._place(tag, text) for tag in self.options.tags]
        there = [place for place in places if place is not None]
        if self.options.partial:
            return len(there) / len(places)
        if len(there) < len(places):
            return 0.0
        ends = [(0, 0), *there, (len(text), len(text))]
        return float(all(left[1] <= right[0] and not text[left[1] : right[0]].strip() for left, right in pairwise(ends)))

    def _place(self, tag: str, text: str) -> tuple[int, int] | None:
        """Where the tag opens and where it is closed, if it does either just once."""
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return None
        start, stop = text.index(opening), text.index(closing)
        return (start, stop + len(closing)) if start < stop else None


class LengthOptions(TimedOptions):
    low: NonNegativeInt = Field(0, description="Shortest length of full reward.")
    high: PositiveInt | None = Field(None, description="Longest length of full reward; null for none.")
    budget: str | None = Field(None, description="Column with each prompt's own `high`, instead.")
    fade: PositiveInt = Field(512, description="Beyond these bounds the reward falls to 0 over so much.")
    in_characters: bool = Field(False, description="Count characters of the text, not the policy's tokens.")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.high is not None and self.budget is not None:
            raise ValueError("`high` and `budget` both say how long is too long; leave one out")
        if self.high is not None and self.high < self.low:
            raise ValueError(f"`high` = {self.high} is below `low` = {self.low}")
        if self.high is None and self.budget is None and not self.low:
            raise ValueError("needs `low`, `high` or `budget`: without them every length is right")
        return self


class Length(ComputedReward[LengthOptions]):
    """1 where the response is as long as asked, less the further it is from that, 0 from `fade` on."""

    name: ClassVar[str] = "length"
    takes: ClassVar[type[Options]] = LengthOptions
    example: ClassVar[str] = "{name: length, weight: 0.2, options: {high: 2000, fade: 1000}}"

    def columns(self) -> frozenset[str]:
        return frozenset() if self.options.budget is None else frozenset({self.options.budget})

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        length = len(text) if self.options.in_characters else int(sample.loss_mask.sum())
        outside = max(self.options.low - length, length - self._high(prompt, length), 0)
        return max(0.0, 1 - outside / self.options.fade)

    def _high(self, prompt: Prompt, length: int) -> int:
        if self.options.budget is None:
            return length if self.options.high is None else self.options.high
        budget = column(prompt, self.options.budget)
        try:
            return int(budget)
        except (TypeError, ValueError):
            raise RewardError(f"column '{self.options.budget}' holds no whole number: {budget!r:.100}") from None

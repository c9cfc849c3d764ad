"""Rewards that compare an answer with a column of the data by a plain rule."""

import re
from abc import abstractmethod
from collections import Counter
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from megatron_rl.rewards.answers import Place, accepted, extract, last_number, normal, number
from megatron_rl.rewards.base import ComputedReward, Options, RewardError, TimedOptions, column
from megatron_rl.types import Prompt, Sample


def compiled(pattern: str | None) -> str | None:
    """A regular expression that is one."""
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
    return pattern


class AnswerOptions(TimedOptions):
    """Options of rewards that look for an answer."""

    answer: str = Field("answer", description="Column with the right answer, or with a list of right ones.")
    after: str | None = Field(None, description="Look only behind the last of these, `</think>` say; without it: no answer.")
    extract: Place = Field("all", description="Where the answer stands in what is looked at.")
    pattern: str | None = Field(
        None, description="A regular expression instead: the first group of its last match, or the whole match."
    )

    _pattern = field_validator("pattern")(compiled)

    def find(self, text: str) -> str | None:
        return extract(text, after=self.after, place=self.extract, pattern=self.pattern)


class NormalOptions(AnswerOptions):
    """Options of rewards that compare texts."""

    ignore_case: bool = Field(False, description="A and a are the same.")
    ignore_space: bool = Field(True, description="Blanks around the answer, and how many stand within, do not count.")
    ignore_punctuation: bool = Field(False, description="Commas, dots, quotes and the like do not count.")

    def normal(self, text: str) -> str:
        return normal(text, case=self.ignore_case, space=self.ignore_space, punctuation=self.ignore_punctuation)


class AnswerReward[O: AnswerOptions](ComputedReward[O]):
    """Of a response that holds an answer."""

    def columns(self) -> frozenset[str]:
        return frozenset({self.options.answer})

    def answer(self, text: str) -> str | None:
        """What the response answers, without the differences that do not count."""
        found = self.options.find(text)
        return None if found is None else self.plain(found)

    @abstractmethod
    def plain(self, answer: str) -> str | None:
        """An answer in a form that equal ones share."""


class Exact(AnswerReward[NormalOptions]):
    """1 where the answer is, letter by letter, a right one; else 0."""

    name: ClassVar[str] = "exact"
    takes: ClassVar[type[Options]] = NormalOptions
    example: ClassVar[str] = "{name: exact, options: {after: '</think>', ignore_case: true}}"

    def plain(self, answer: str) -> str | None:
        return self.options.normal(answer)

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        right = {self.options.normal(each) for each in accepted(column(prompt, self.options.answer))}
        answer = self.options.find(text)
        return float(answer is not None and self.options.normal(answer) in right)


class NumericOptions(AnswerOptions):
    extract: Place = Field("last_number", description="Where the answer stands in what is looked at.")
    absolute: NonNegativeFloat = Field(1e-6, description="Difference that does not count.")
    relative: NonNegativeFloat = Field(1e-6, description="Difference that does not count, as a part of the right answer.")


class Numeric(AnswerReward[NumericOptions]):
    """1 where the answer is a number, or a fraction, close enough to a right one; else 0. 1,234.5 and 50% are 1234.5 and 50."""

    name: ClassVar[str] = "numeric"
    takes: ClassVar[type[Options]] = NumericOptions
    example: ClassVar[str] = "{name: numeric, options: {answer: result, relative: 0.01}}"

    def plain(self, answer: str) -> str | None:
        value = number(answer)
        return None if value is None else f"{value:.12g}"

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        right = [self._right(each) for each in accepted(column(prompt, self.options.answer))]
        found = self.options.find(text)
        answer = None if found is None else number(found)
        if answer is None:
            return 0.0
        return float(any(abs(answer - each) <= max(self.options.absolute, self.options.relative * abs(each)) for each in right))

    def _right(self, text: str) -> float:
        """Right answers may come with words around: GSM8K's end with `#### 42`."""
        value = number(text)
        if value is None and (last := last_number(text)) is not None:
            value = number(last)
        if value is None:
            raise RewardError(f"column '{self.options.answer}' holds no number: {text!r:.100}")
        return value


class RegexOptions(TimedOptions):
    pattern: str | None = Field(None, description="The regular expression, for all prompts.")
    column: str | None = Field(None, description="The column that holds each prompt's own, instead.")
    match: Literal["anywhere", "whole"] = Field("anywhere", description="Whether it must match all of the response.")
    ignore_case: bool = Field(False, description="A and a are the same.")
    dot_matches_newline: bool = Field(True, description="A dot stands for a line's end too.")

    _pattern = field_validator("pattern")(compiled)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.pattern is None) == (self.column is None):
            raise ValueError("needs either `pattern` or `column`")
        return self


class Regex(ComputedReward[RegexOptions]):
    """1 where a regular expression matches the response, else 0."""

    name: ClassVar[str] = "regex"
    takes: ClassVar[type[Options]] = RegexOptions
    example: ClassVar[str] = "{name: regex, options: {pattern: 'Answer: \\d+$'}}"

    def columns(self) -> frozenset[str]:
        return frozenset() if self.options.column is None else frozenset({self.options.column})

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        flags = re.IGNORECASE * self.options.ignore_case | re.DOTALL * self.options.dot_matches_newline
        pattern = self.options.pattern
        if pattern is None:
            assert self.options.column is not None
            pattern = str(column(prompt, self.options.column))
        try:
            wanted = re.compile(pattern, flags)
        except re.error as error:
            raise RewardError(f"column '{self.options.column}' holds no regular expression: {pattern!r}: {error}") from None
        return float((wanted.search(text) if self.options.match == "anywhere" else wanted.fullmatch(text)) is not None)


class SetF1Options(NormalOptions):
    separators: str = Field(",;\n", min_length=1, description="Characters between items.")
    count_repeats: bool = Field(False, description="An item named twice counts twice.")


class SetF1(AnswerReward[SetF1Options]):
    """How well the items of the answer match those of the column: the harmonic mean of precision and recall."""

    name: ClassVar[str] = "set_f1"
    takes: ClassVar[type[Options]] = SetF1Options
    example: ClassVar[str] = "{name: set_f1, options: {after: 'Answer:', separators: ','}}"

    def plain(self, answer: str) -> str | None:
        return "\n".join(sorted(self._items(answer).elements()))

    def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        right = self._items(column(prompt, self.options.answer))
        found = self.options.find(text)
        answer = self._items("" if found is None else found)
        if not right and not answer:
            return float(found is not None)
        return 2 * (right & answer).total() / (right.total() + answer.total())

    def _items(self, value: Any) -> Counter[str]:
        """The items of a text, brackets around them left out, or of a list."""
        if isinstance(value, str):
            value = value.strip()
            if value and value[0] + value[-1] in ("[]", "{}", "()"):
                value = value[1:-1]
            value = re.split(f"[{re.escape(self.options.separators)}]", value)
        items = Counter(item for each in value if (item := self.options.normal(str(each)).strip()))
        return items if self.options.count_repeats else Counter(set(items))

"""Prompts with the responses that shall follow them, as sequences to learn from.

A sequence is what a rollout would be if the policy had written the response: the prompt's tokens, the response's, and the
token that ends it. The last two count. Which sequence stands where follows from the settings, as for prompts; rows that
cannot be learned from are found before anything is trained, and passed over.
"""

import itertools
import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_rl.config.errors import DataError
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.types import Prompt, Sequence

type Place = tuple[int, int]  # the number of a source, and a place among its usable rows


class Unusable(Exception):
    """A row that cannot be learned from, and why."""


@dataclass(frozen=True)
class Demonstrator:
    """How a prompt becomes a sequence."""

    tokenizer: Tokenizer
    response: str  # a wording, the prompt's fields in braces
    longest: int  # tokens of a sequence

    def sequence(self, index: int, prompt: Prompt) -> Sequence:
        """Prompt, response and end; Unusable where there is no response, or too long a one."""
        response = self.words(prompt)
        tokens = [*prompt.tokens.tolist(), *self.tokenizer.encode([response], special=False)[0], self.tokenizer.end]
        if len(tokens) > self.longest:
            raise Unusable(f"{len(tokens)} tokens with its response, and a sequence has {self.longest} at most")
        return Sequence(index, np.array(tokens, dtype=np.int64), loss_mask=np.arange(len(tokens)) >= len(prompt.tokens))

    def words(self, prompt: Prompt) -> str:
        """The response in words."""
        empty = [name for name in wording_fields(self.response) if prompt.fields[name] is None]
        response = "" if empty else self.response.format_map(prompt.fields)
        if not response.strip():
            raise Unusable(f"no response: {', '.join(empty)} is empty" if empty else "no response: it is blank")
        return response

    def require_fields(self, prompts: PromptStream) -> None:
        """Every source's prompts have the fields that the response is made of."""
        for source in prompts.sources:
            fields = source.prompt(0).fields
            missing = [name for name in wording_fields(self.response) if name not in fields]
            if missing:
                raise DataError(
                    f"supervised.response = {self.response}: prompts of {source.name} have no field {missing[0]} (they have "
                    f"{', '.join(sorted(fields)) or 'none'}). Map it in data.sources: answer: COLUMN, or fields: "
                    f"{{{missing[0]}: COLUMN}}; or word the response otherwise."
                )


class Demonstrations:
    """Sequences by step: step s learns from the s-th `batch` of usable rows, whichever process asks, and when."""

    def __init__(
        self,
        prompts: PromptStream,
        demonstrator: Demonstrator,
        *,
        batch: int,
        steps: int,
        strict: bool = False,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Looks at every row that the run will see. With `strict` one that cannot be learned from is an error.

        `advance` is told how many rows were looked at, and how many there are to look at.
        """
        self.batch = batch
        self._prompts, self._demonstrator = prompts, demonstrator
        self.passed_over: dict[str, str] = {}  # rows by key, and why
        demonstrator.require_fields(prompts)
        self._positions = np.array(self._usable(batch * steps, strict, advance), dtype=np.int64)

    def _usable(self, count: int, strict: bool, advance: Callable[[int, int], None]) -> list[int]:
        """The first so many positions whose rows can be learned from."""
        total = min(count, len(self._prompts))
        usable: dict[Place, bool] = {}
        positions: list[int] = []
        for position in itertools.count():
            if len(positions) == count:
                return positions
            number, _, row = self._prompts.place(position)
            if (number, row) not in usable:
                usable[number, row] = self._can_be_learned(self._prompts.sources[number].prompt(row), strict)
                advance(min(len(usable), total), total)
            if usable[number, row]:
                positions.append(position)
            elif len(self.passed_over) == len(self._prompts):
                key, reason = next(iter(self.passed_over.items()))
                raise DataError(f"data: no row can be learned from; {key}, for one: {reason}.")
        raise AssertionError("positions have no end")

    def step(self, step: int) -> list[Sequence]:
        """The sequences of a step."""
        positions = self._positions[step * self.batch : (step + 1) * self.batch]
        return [
            self._demonstrator.sequence(index, self._prompts.at(int(position)).prompt)
            for index, position in enumerate(positions)
        ]

    def _can_be_learned(self, prompt: Prompt, strict: bool) -> bool:
        try:
            self._demonstrator.sequence(0, prompt)
        except Unusable as problem:
            if strict:
                raise DataError(
                    f"data: {prompt.key} cannot be learned from: {problem}. Raise batch.max_sequence (and batch.max_tokens), "
                    "mend the row, or set data.too_long=drop to pass such rows over."
                ) from problem
            self.passed_over[prompt.key] = str(problem)
            return False
        return True


def held_out_sequences(prompts: PromptStream, demonstrator: Demonstrator, most: int) -> list[Sequence]:
    """Sequences of validation prompts, the same every time: at most so many of each source, those alone that fit."""
    demonstrator.require_fields(prompts)
    sequences: list[Sequence] = []
    for prompt in itertools.chain.from_iterable(source.evenly(most) for source in prompts.sources):
        try:
            sequences.append(demonstrator.sequence(len(sequences), prompt))
        except Unusable:
            continue
    if not sequences:
        raise DataError(
            "data: no validation prompt has a response that could be learned from. Look at data.validation_sources."
        )
    return sequences


def wording_fields(response: str) -> list[str]:
    """The fields that a response takes in: plain names, which is what a row has."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(response) if name is not None]
    except ValueError as error:
        raise DataError(
            f"supervised.response = {response}: it cannot be read: {error}. Fields stand in braces; a brace itself is written "
            "twice."
        ) from error
    for name in names:
        if not name.isidentifier():
            raise DataError(f"supervised.response = {response}: {{{name}}} is no field. Write the name of one in the braces.")
    return names

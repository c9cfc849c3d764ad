"""Tests of programs as columns of data hold them, and whether what a program printed is what was expected."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from megatron_rl.rewards.base import RewardError

FENCE = re.compile(r"^[ \t]*(`{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)
LANGUAGES = frozenset({"", "python", "python3", "py"})
Comparison = Literal["tokens", "lines", "exact"]


@dataclass(frozen=True)
class Case:
    """What a program reads, and what it shall print."""

    stdin: str
    expected: str


def program(text: str, which: Literal["last", "first", "whole"]) -> str | None:
    """The Python program in a response; None: there is none."""
    if which == "whole":
        return text
    blocks = [match[3] for match in FENCE.finditer(text) if match[2].lower() in LANGUAGES]
    return blocks[-1 if which == "last" else 0] if blocks else None


def cases(value: Any, stdin: str, expected: str) -> list[Case]:
    """Pairs of input and output: a list of {input, output}, or {input: […], output: […]}, or either as JSON text.

    `stdin` and `expected` are the names of the two; their plurals are known too.
    """
    value = _read(value)
    if isinstance(value, Mapping):
        left, right = (_either(value, name) for name in (stdin, expected))
        if not all(isinstance(side, Sequence) and not isinstance(side, str) for side in (left, right)):
            left, right = [left], [right]
        if len(left) != len(right):
            raise RewardError(f"tests hold {len(left)} inputs for {len(right)} outputs")
        pairs = list(zip(left, right, strict=True))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        pairs = []
        for each in value:
            if not isinstance(each, Mapping):
                raise RewardError(f"a test is no mapping with {stdin} and {expected}: {each!r:.100}")
            pairs.append((_either(each, stdin), _either(each, expected)))
    else:
        raise RewardError(f"tests are neither a list nor a mapping: {value!r:.100}")
    if not pairs:
        raise RewardError("there are no tests")
    return [Case(_text(left), _text(right)) for left, right in pairs]


def assertions(value: Any) -> list[str]:
    """Statements that must not raise: a list of texts, such a list as JSON, or one text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _read(value)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RewardError(f"tests are no texts with statements: {value!r:.100}")
    return list(texts)


def same(printed: str, expected: str, how: Comparison, tolerance: float) -> bool:
    """tokens: the same words whatever the blanks between; lines: the same but for blanks at ends of lines and of the text."""
    if how == "exact":
        return printed == expected
    if how == "tokens":
        left, right = printed.split(), expected.split()
    else:
        left, right = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (printed, expected))
    if len(left) != len(right):
        return False
    return all(a == b or (tolerance > 0 and _close(a, b, tolerance)) for a, b in zip_longest(left, right))


def _close(left: str, right: str, tolerance: float) -> bool:
    try:
        a, b = float(left), float(right)
    except ValueError:
        return False
    return abs(a - b) <= tolerance * max(1.0, abs(b))


def _read(value: Any) -> Any:
    """JSON, where it is a text; arrays of other libraries as lists."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise RewardError(f"tests are text and no JSON ({error}): {value!r:.100}") from None
    return value.tolist() if hasattr(value, "tolist") else value


def _either(value: Mapping[str, Any], name: str) -> Any:
    for known in (name, f"{name}s"):
        if known in value:
            return value[known]
    raise RewardError(f"a test has no '{name}'; it has {', '.join(map(str, value)) or 'nothing'}")


def _text(value: Any) -> str:
    """Lines may come as a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "\n".join(map(str, value))
    return str(value)

"""Finding the answer in a response, and comparing texts and numbers. Pure functions."""

import math
import re
import string
from collections.abc import Iterable
from typing import Any, Literal

Place = Literal["all", "last_line", "boxed", "last_number"]

NUMBER = re.compile(
    r"""(?:(?<![\w.)\]}])[-+−])?              # a sign, but no minus between two numbers
        (?<![\d.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
        (?:[eE][-+]?\d+)?""",
    re.VERBOSE,
)
BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:and|or)?[\s$,;]*")
BOX = re.compile(r"\\f?box(?:ed)?\s*\{")


def extract(text: str, *, after: str | None, place: Place, pattern: str | None) -> str | None:
    """The answer in a response; None: there is none."""
    if after is not None:
        _, found, text = text.rpartition(after)
        if not found:
            return None
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) if matches else None
    match place:
        case "all":
            return text
        case "last_line":
            return next((line for line in reversed(text.splitlines()) if line.strip()), None)
        case "boxed":
            return last_box(text)
        case "last_number":
            return last_number(text)


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{} whose braces are balanced."""
    boxes = last_boxes(text)
    return boxes[-1] if boxes else None


def last_boxes(text: str) -> list[str]:
    r"""What stands in the last \boxed{}, and in those right before it: several answers with no more than `and` between them."""
    boxes: list[str] = []
    reach = len(text)
    for opening in reversed(list(BOX.finditer(text))):
        stop = _closing(text, opening.end())
        if stop is None or stop >= reach:  # unfinished, or around one that is taken already
            continue
        if boxes and not BETWEEN_BOXES.fullmatch(text, stop + 1, reach):
            break
        boxes.insert(0, text[opening.end() : stop])
        reach = opening.start()
    return boxes


def _closing(text: str, start: int) -> int | None:
    """Where the brace closes that was opened before `start`."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
        if depth == 0:
            return place
    return None


def last_number(text: str) -> str | None:
    """The last number, with the fraction that it may be the lower part of."""
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    if len(found) > 1 and text[found[-2].end() : found[-1].start()].strip() == "/":
        return f"{found[-2][0]}/{found[-1][0]}"
    return found[-1][0]


def number(text: str) -> float | None:
    """The value of a text that is a number or a fraction, maybe with a currency or percent sign; else None."""
    parts = [part.strip().strip("$€£%").strip() for part in text.strip().rstrip(".").split("/")]
    if len(parts) > 2 or not all(NUMBER.fullmatch(part) for part in parts):
        return None
    values = [float(part.replace(",", "").replace("−", "-")) for part in parts]
    if len(values) == 2:
        if values[1] == 0:
            return None
        values = [values[0] / values[1]]
    return values[0] if math.isfinite(values[0]) else None


def normal(text: str, *, case: bool, space: bool, punctuation: bool) -> str:
    """A text without differences that shall not count."""
    if case:
        text = text.casefold()
    if punctuation:
        text = text.translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.split()) if space else text


def accepted(value: Any) -> list[str]:
    """The right answers of a column: one, or a list of them."""
    many = isinstance(value, Iterable) and not isinstance(value, str | bytes | dict)
    return [str(each) for each in value] if many else [str(value)]

"""What a user wrote: does a value fit the type of an option, and which name may a wrong one have been meant to be?"""

import math
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

SIMILAR = 0.6  # difflib ratio from which a name counts as a slip of the pen for another
NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", NoneType: "none"}


def fits(value: Any, hint: Any) -> bool:
    """Types of options: bool, int, float, str, None, unions, literals, and mappings of them."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is Mapping:
        key, item = get_args(hint)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def say_type(hint: Any) -> str:
    """The type in words."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(say_type(each) for each in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(str(each) for each in get_args(hint))
    if origin is Mapping:
        return "numbers by name"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def suggestion(word: str, known: Iterable[str]) -> str | None:
    """`did you mean 'gspo' or 'gtpo'?`: all names that are equally near; None if none is near."""
    nearness = {name: SequenceMatcher(None, name, word.lower()).ratio() for name in known}
    best = max(nearness.values(), default=0.0)
    if best < SIMILAR:
        return None
    nearest = [name for name, ratio in nearness.items() if ratio == best]
    nearest.sort(key=lambda name: sorted(name) != sorted(word.lower()))  # first what has the same letters
    *others, last = (f"'{name}'" for name in nearest)
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"

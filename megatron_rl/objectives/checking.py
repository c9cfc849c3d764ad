"""Does a value that a user wrote fit the type of an option?"""

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

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

"""Every reward by its name, and how the section `rewards:` becomes components.

A name with a colon, `my_package.my_module:function`, is the user's own function (function.py).
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import cleandoc
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.names import allowed_values
from megatron_rl.config.reward_settings import RewardPart
from megatron_rl.rewards import function, rules, shape
from megatron_rl.rewards.base import Options, Reward
from megatron_rl.rewards.code import Code
from megatron_rl.rewards.judge import Judge
from megatron_rl.rewards.mathematics import Math
from megatron_rl.rewards.remote import Http

Words = Mapping[str, Any]

REWARDS: dict[str, type[Reward[Any]]] = {
    cls.name: cls
    for cls in (
        rules.Exact,
        rules.Numeric,
        rules.Regex,
        rules.SetF1,
        Math,
        Code,
        shape.Format,
        shape.Length,
        Http,
        Judge,
    )
}


@dataclass(frozen=True)
class Component:
    """A part of the total: total = Σ weight × reward."""

    name: str
    weight: float
    reward: Reward[Any]
    words: tuple[str, Words]  # what it was made of: the reward's name and its options


def build(parts: Sequence[RewardPart]) -> tuple[Component, ...]:
    """The components, or a SettingsError that lists all that is wrong."""
    problems, components = [], []
    for index, part in enumerate(parts):
        place = f"rewards[{index}]"
        try:
            cls = find(part.name)
        except ValueError as error:
            problems.append(f"{place}.name = {part.name}: {error}")
            continue
        found = list(_wrong_options(cls, part.options, f"{place}.options"))
        if not found:
            try:
                reward = make(part.name, part.options)
                components.append(Component(part.component or part.name, part.weight, reward, (part.name, part.options)))
            except ValueError as error:
                found.append(f"{place}: {part.name} {error}.")
        problems += found
        if not math.isfinite(part.weight):
            problems.append(f"{place}.weight = {part.weight}: expected a finite number.")
    counts = Counter(part.component or part.name for part in parts)
    problems += [
        f"rewards: component '{name}' is there {count} times. Give each its own name: {{name: …, as: {name}_2}}."
        for name, count in counts.items()
        if count > 1
    ]
    if problems:
        raise SettingsError("\n".join(problems))
    return tuple(components)


def columns(components: Sequence[Component]) -> dict[str, frozenset[str]]:
    """The columns of the data that each component reads, so that a missing one is known before anything is sampled."""
    return {component.name: component.reward.columns() for component in components}


def find(name: str) -> type[Reward[Any]]:
    """The class of a reward, or a ValueError with the fix."""
    if ":" in name:
        return function.reward_of(name)
    if name not in REWARDS:
        close = get_close_matches(name, REWARDS, 1)
        hint = (
            f"Did you mean '{close[0]}'?"
            if close
            else f"There are {', '.join(REWARDS)}; your own is 'package.module:function'."
        )
        raise ValueError(f"there is no such reward. {hint}")
    return REWARDS[name]


def make(name: str, options: Words) -> Reward[Any]:
    """A reward from its name and options."""
    cls = find(name)
    return cls(_read(cls, options))


def _read(cls: type[Reward[Any]], options: Words) -> Options:
    """Through JSON, as all settings: strict there takes a list for a tuple and text for a path, but no "4" for a number."""
    return cls.takes.model_validate_json(json.dumps(dict(options), default=str), strict=True)


def _wrong_options(cls: type[Reward[Any]], options: Words, place: str) -> Iterator[str]:
    """One line for each option that does not exist, is missing, or does not fit."""
    try:
        _read(cls, options)
    except ValidationError as error:
        fields = cls.takes.model_fields
        for detail in {(d["loc"][:1], d["type"]): d for d in error.errors()}.values():
            name = str(detail["loc"][0]) if detail["loc"] else ""
            cause = str(detail.get("ctx", {}).get("error", ""))
            match detail["type"]:
                case "extra_forbidden":
                    close = get_close_matches(name, fields, 1)
                    hint = f"Did you mean '{close[0]}'?" if close else f"It has {', '.join(fields)}."
                    yield f"{place}.{name}: {cls.name} has no such option. {hint}"
                case "missing":
                    yield f"{place}.{name} is not set and has no default: {fields[name].description}"
                case "value_error":
                    yield f"{place}.{name} = {options.get(name)}: {cause}." if name else f"{place}: {cls.name} {cause}."
                case _:
                    value = json.dumps(options.get(name), default=str)
                    yield f"{place}.{name} = {value}: expected {allowed_values(fields[name])}."


# -- describing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    name: str
    allowed: str
    default: str
    text: str


@dataclass(frozen=True)
class Entry:
    """A reward in words."""

    name: str
    text: str
    example: str
    options: tuple[Option, ...]


def entry(name: str) -> Entry:
    """What the declarations of a reward say; of a function of the user's own, its docstring."""
    cls = find(name)
    own = getattr(cls, "function", None)
    text = cleandoc((own.__doc__ if own is not None else cls.__doc__) or cls.__doc__ or "")
    return Entry(name, text, cls.example, tuple(_describe(cls.takes)))


def catalogue() -> list[Entry]:
    return [entry(name) for name in REWARDS]


def _describe(options: type[Options]) -> Iterator[Option]:
    for name, field in options.model_fields.items():
        default = "required" if field.default is PydanticUndefined else _written(field.default)
        yield Option(name, allowed_values(field), default, field.description or "")


def _written(value: Any) -> str:
    """A default as settings write it; long texts by their first words."""
    if isinstance(value, str):
        short = value if len(value) < 60 else f"{value.splitlines()[0][:50]}…"
        return short if short.isprintable() else json.dumps(short)
    return json.dumps(value, default=str)

"""From the section `objective:` of the settings to the objective and advantage of a run.

What parts and options there are is known by megatron_rl.objectives and not by the settings; so they are checked here, before
anything heavy is loaded, and named as they stand in the settings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import ObjectivePart, ObjectiveSettings
from megatron_rl.objectives import registry
from megatron_rl.objectives.advantages import Advantage
from megatron_rl.objectives.base import Objective
from megatron_rl.objectives.compose import ComposedObjective


def build(settings: ObjectiveSettings) -> tuple[Objective, Advantage | None]:
    """The objective and how its advantages are made, or a SettingsError that lists all that is wrong."""
    problems = list(_wrong_parts(settings))
    if problems:
        raise SettingsError("\n".join(problems))
    try:
        objective = registry.build_objective(
            settings.surrogate,
            settings.options,
            weights=_pairs(settings.weights),
            penalties=_pairs(settings.penalties),
            on_policy=settings.on_policy,
        )
        advantage = (
            registry.build_advantage(settings.advantage, settings.advantage_options) if settings.advantage is not None else None
        )
        registry.refuse_pair(advantage, objective, reference=settings.reference != "none", on_policy=settings.on_policy)
    except ValueError as error:
        raise SettingsError(f"objective: {error}") from error
    _refuse_correction_of_nothing(settings, objective)
    _refuse_replay_of_nothing(settings, objective)
    if settings.old_log_probs == "rollout" and isinstance(objective, ComposedObjective):
        objective = replace(objective, old_is_rollout=True)
    return objective, advantage


def _wrong_parts(settings: ObjectiveSettings) -> Iterator[str]:
    """One line for each part or option that does not exist, and each value that does not fit."""
    place = "objective.surrogate"
    yield from _wrong("surrogate", registry.SURROGATES, settings.surrogate, settings.options, place, "objective.options")
    if settings.advantage is not None:
        place, options = "objective.advantage", "objective.advantage_options"
        yield from _wrong("advantage", registry.ADVANTAGES, settings.advantage, settings.advantage_options, place, options)
    elif settings.advantage_options:
        yield "objective.advantage_options are set and objective.advantage is null. Remove them, or name an advantage."
    for kind, table, parts, section in (
        ("weight", registry.WEIGHTS, settings.weights, "objective.weights"),
        ("penalty", registry.PENALTIES, settings.penalties, "objective.penalties"),
    ):
        for i, part in enumerate(parts):
            place = f"{section}[{i}]"
            yield from _wrong(kind, table, part.name, part.options, f"{place}.name", f"{place}.options")


def _wrong(
    kind: str, table: Mapping[str, type], name: str, options: Mapping[str, Any], name_place: str, options_place: str
) -> Iterator[str]:
    try:
        cls = registry.find(kind, table, name)
    except ValueError as error:
        yield f"{name_place} = {name}: {error}"
        return
    for option, problem in registry.wrong_options(name, cls, options):
        yield f"{options_place}.{option} = {options[option]}: {problem}"


def _pairs(parts: Sequence[ObjectivePart]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(part.name, part.options) for part in parts]


def _refuse_correction_of_nothing(settings: ObjectiveSettings, objective: Objective) -> None:
    """Weights for the mismatch of `old` and `rollout` are all 1 where `old` is `rollout`."""
    if settings.old_log_probs == "rollout" and isinstance(objective, ComposedObjective):
        weights = [weight.name for weight in objective.weights if {"old", "rollout"} <= weight.needs_columns]
        if weights:
            raise SettingsError(
                f"objective.weights: {', '.join(weights)} corrects for the difference between the trainer's log-probs and the "
                "rollout's, and objective.old_log_probs = rollout takes the one for the other. Set it to recompute, or leave "
                "the weight out."
            )


def _refuse_replay_of_nothing(settings: ObjectiveSettings, objective: Objective) -> None:
    """The trainer's own routing is written down when `old` is computed."""
    reads = objective.needs_columns if isinstance(objective, ComposedObjective) else frozenset({"old"})
    if settings.routing_replay == "policy" and "old" not in reads:
        raise SettingsError(
            f"objective.routing_replay = policy with objective.surrogate = {settings.surrogate}: nothing in it reads `old`, so "
            "there is no pass whose routing updates could repeat. Set objective.routing_replay to off or rollout."
        )

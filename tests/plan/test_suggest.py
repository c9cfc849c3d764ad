"""Suggested layouts: they fit, pass every check, and none that was looked at is faster."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import check
from megatron_rl.config.layout_map import stage_layers
from megatron_rl.plan.machine import find_machine
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.suggest import candidates, suggestions, with_ranks
from tests.config.models import DENSE, LATENT, MODELS, MOE
from tests.plan.jobs import job

SMALL = find_machine("h100").model_copy(update={"memory_gib": 4.0, "reserve_gib": 2.0})


def seconds(plan: Plan) -> float:
    return plan.training.old + plan.training.update


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_suggested_fits_and_is_the_fastest(model: Architecture) -> None:
    planned = job(model, 16, machine=SMALL)
    found = suggestions(planned, 3)
    assert found
    plans = [suggestion.plan for suggestion in found]
    assert all(not plan.policy_problems for plan in plans)
    assert all(check(plan.job.settings, model, 16) == [] for plan in plans)
    assert [seconds(plan) for plan in plans] == sorted(map(seconds, plans))
    others = [Plan(each) for each in candidates(planned)]
    able = [plan for plan in others if not plan.policy_problems and not check(plan.job.settings, model, 16)]
    assert seconds(plans[0]) == min(map(seconds, able))
    assert len(able) < len(others)


def test_candidates_deal_out_every_layer_and_rank() -> None:
    model = replace(MOE, layers=7, moe_layers=(True,) * 7)
    planned = job(model, 24)
    layouts = {each.layout for each in candidates(planned)}
    assert {layout.pipeline for layout in layouts} == {1, 2, 4}
    for layout in layouts:
        stages = stage_layers(layout, model)
        assert sorted(layer for chunks in stages for chunk in chunks for layer in chunk) == list(range(7))
        assert 24 % (layout.tensor * layout.pipeline * layout.context) == 0


def test_settings_to_write_are_those_of_the_plan() -> None:
    planned = job(LATENT, 16, machine=SMALL)
    (first,) = suggestions(planned, 1)
    sections: dict[str, dict[str, Any]] = {}
    for name, value in first.settings.items():
        section, _, last = name.partition(".")
        sections.setdefault(section, {})[last] = value
    again = Plan(job(LATENT, 16, machine=SMALL, layout=sections["layout"], recompute=sections["recompute"]))
    assert seconds(again) == seconds(first.plan) and again.largest.peak == first.plan.largest.peak


def test_no_layout_where_none_fits() -> None:
    tiny = SMALL.model_copy(update={"memory_gib": 1.2, "reserve_gib": 1.0})
    assert suggestions(job(DENSE, 2, machine=tiny), 3) == []


def test_another_number_of_ranks() -> None:
    settings = job(MOE, cluster={"nodes": 4}).settings
    assert settings.world_size == 32 and with_ranks(settings, 8).world_size == 8
    assert check(with_ranks(settings, 8), MOE, 8) == []

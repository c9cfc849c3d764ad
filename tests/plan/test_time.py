"""The model of time: work against the cost model that packing uses, and what must hold of any machine."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.counting import model_parameters
from megatron_rl.data.packing import CostModel
from megatron_rl.plan.job import Job, Workload, workload_of
from megatron_rl.plan.layer_time import Times, layer_backward, layer_forward, product_seconds
from megatron_rl.plan.machine import find_machine
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.products import Cut, Product, layer_products, pair_operations
from tests.config.models import DENSE, LATENT, MODELS, MOE
from tests.plan.jobs import WORK, job

WHOLE = Cut(tokens=1, local=1, routed=2, tensor=1, expert=1, expert_tensor=1)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_work_is_that_of_the_cost_model(model: Architecture) -> None:
    """The same operations, counted elsewhere by another hand, for balancing packs."""
    kinds = model.moe_layers or (False,) * model.layers
    products = sum(product.operations for kind in kinds for product in layer_products(model, kind, WHOLE))
    cost = CostModel.of(model)
    assert products + 2 * model.hidden * model.vocab == cost.linear
    assert model.layers * pair_operations(model) / 2 == cost.quadratic  # causality halves the pairs


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_products_go_through_every_weight_of_a_layer(model: Architecture) -> None:
    """Every weight that is no norm and no vector stands in one product."""
    kinds = model.moe_layers or (False,) * model.layers
    weights = sum(p.inner * p.columns * p.count for kind in kinds for p in layer_products(model, kind, WHOLE))
    whole = model_parameters(model)
    assert weights == whole.attention + whole.dense + whole.router + whole.experts + whole.shared_experts


@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"context": 2}, {"tensor": 2, "expert": 4}, {"expert": 4, "expert_tensor": 2}]
)
def test_what_is_cut_is_shared_out(sizes: dict[str, int]) -> None:
    """All ranks of a replica together multiply as much as one alone; what tensor ranks hold whole, for their tokens each."""

    def operations(planned: Job, ranks: int) -> float:
        layout = planned.layout
        local = planned.local * 1
        cut = Cut(
            planned.context_tokens, local, local * 2 * layout.expert_tensor, layout.tensor, layout.expert, layout.expert_tensor
        )
        return ranks * sum(product.operations for product in layer_products(MOE, True, cut))

    ranks = sizes.get("tensor", 1) * sizes.get("context", 1)
    assert operations(job(MOE, 8, layout=sizes), ranks) == pytest.approx(operations(job(MOE, 8), 1))


def test_the_longer_of_operations_and_bytes_counts() -> None:
    planned = job(DENSE)
    machine = planned.machine
    large = Product(8192, 8192, 8192)
    computed = large.operations / (machine.tflops.bfloat16 * 1e12 * machine.shares.matmul)
    assert product_seconds(planned, large) == pytest.approx(computed)
    thin = Product(1, 8192, 8192)
    moved = (8192 * 8192 + 2 * 8192) * 2 / (machine.memory_gb_s * 1e9 * machine.shares.memory)
    assert product_seconds(planned, thin) == pytest.approx(moved)


@pytest.mark.parametrize("moe", [False, True])
def test_recomputing_all_costs_a_forward_pass(moe: bool) -> None:
    plain, full = (job(LATENT, recompute={"mode": mode}) for mode in ("none", "full"))
    again = layer_backward(full, moe).total - layer_backward(plain, moe).total
    assert again == pytest.approx(layer_forward(plain, moe).total)


@pytest.mark.parametrize("module", ["core_attn", "moe_act", "layernorm", "mla_up_proj", "moe", "shared_experts"])
def test_recomputing_a_part_costs_less(module: str) -> None:
    plain = job(LATENT)
    part = job(LATENT, recompute={"mode": "selective", "modules": [module]})
    again = layer_backward(part, True).total - layer_backward(plain, True).total
    assert 0 < again < layer_forward(plain, True).total


def test_one_rank_sends_nothing() -> None:
    times = layer_forward(job(MOE, 1), True)
    assert times.tensor == times.dispatch == times.context == 0 < times.experts
    spread = layer_forward(job(MOE, 8, layout={"tensor": 2, "context": 2, "expert": 4}), True)
    assert spread.tensor > 0 and spread.dispatch > 0


def test_experts_beyond_a_domain_are_farther_away() -> None:
    near, far = (job(MOE, 16, layout={"expert": size}) for size in (8, 16))
    assert layer_forward(far, True).dispatch > 2 * layer_forward(near, True).dispatch
    deduplicated = replace(
        far, settings=far.settings.model_copy(update={"moe": far.settings.moe.model_copy(update={"dispatcher": "flex"})})
    )
    assert layer_forward(deduplicated, True).dispatch <= layer_forward(far, True).dispatch


LAYOUTS = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from([1, 2, 4]),
        "pipeline": st.sampled_from([1, 2, 4]),
        "virtual_pipeline": st.sampled_from([1, 2]),
        "context": st.sampled_from([1, 2]),
        "expert": st.sampled_from([1, 4, 8]),
    }
)
FASTER: dict[str, Any] = {"memory_gb_s": 6700, "tflops": None, "inside": None, "between": None}


@settings(deadline=None, max_examples=40)
@given(layout=LAYOUTS, faster=st.sampled_from(sorted(FASTER)))
def test_a_faster_machine_is_never_slower(layout: dict[str, int], faster: str) -> None:
    if layout["pipeline"] == 1:
        layout = {**layout, "virtual_pipeline": 1}
    machine = find_machine("h100")
    part = getattr(machine, faster)
    if FASTER[faster] is None:
        part = part.model_copy(
            update={field: 2 * getattr(part, field) for field in ("gb_s", "bfloat16") if hasattr(part, field)}
        )
    else:
        part = FASTER[faster]
    better = machine.model_copy(update={faster: part})
    slow, fast = (Plan(job(MOE, 64, machine=each, layout=layout)) for each in (machine, better))
    assert fast.step_seconds <= slow.step_seconds
    assert slow.training.update > 0 and slow.training.bubble >= 0


def test_more_stages_wait_more_and_chunks_less() -> None:
    def bubble(pipeline: int, virtual: int) -> float:
        return Plan(job(MOE, 8, layout={"pipeline": pipeline, "virtual_pipeline": virtual})).training.bubble

    assert bubble(1, 1) == 0 < bubble(4, 2) < bubble(4, 1) < bubble(8, 1)
    packs = job(MOE, 8, layout={"pipeline": 4, "virtual_pipeline": 2}).micro_batches
    assert packs % 4 == 0 and bubble(4, 2) == pytest.approx(1.5 / (packs + 1.5))


def test_phases_that_are_not_asked_for_take_no_time() -> None:
    assert Plan(job(MOE, objective={"on_policy": True})).training.old == 0
    plain, referred = (Plan(job(MOE, objective={"reference": which})).training.old for which in ("none", "initial"))
    assert referred > 2 * plain
    assert set(Plan(job(MOE, bank={"replay": "bank"})).phases) == {"old", "update"}
    given = Plan(job(MOE, objective={"reference": "initial"}, work=replace(WORK, supervised=True)))
    assert given.training.old == 0 and set(given.phases) == {"update"}  # suggestions are ranked by both, shown or not


def test_sampling_ahead_hides_behind_learning() -> None:
    turns, ahead = (Plan(job(MOE, sampling={"ahead": steps})) for steps in (0, 1))
    assert turns.step_seconds == sum(turns.phases.values())
    shorter = min(turns.phases["rollout"], turns.phases["old"] + turns.phases["update"])
    assert ahead.step_seconds == pytest.approx(turns.step_seconds - shorter)


def test_times_add_up() -> None:
    times = Times(**{field.name: 2.0**power for power, field in enumerate(fields(Times))})
    assert times.total == 2 ** len(fields(Times)) - 1
    assert (times + times).total == (times * 2).total == 2 * times.total


# -- the work of a step ------------------------------------------------------------------------------------------------


@given(longest=st.integers(10, 10_000), share=st.floats(0.05, 1.0))
def test_the_course_of_responses_has_their_mean(longest: int, share: float) -> None:
    response = max(1, int(longest * share))
    work = Workload(1, 1, prompt=100, response=response, longest=longest)
    points = (np.arange(20_000) + 0.5) / 20_000
    alive = (1 - points) ** work.decay  # the share of responses longer than this
    assert alive.mean() * longest == pytest.approx(response, rel=0.01)
    second = 2 * (alive * points).mean() * longest**2  # E[x^2] = 2 times the integral of x P(longer than x)
    expected = (100**2 + 200 * response + second) / (100 + response)
    assert work.attended == pytest.approx(expected, rel=0.01)


def test_lengths_that_nobody_told_come_from_the_settings() -> None:
    planned = job(MOE, sampling={"max_new_tokens": 2000, "groups": 3, "group_size": 5}, data={"max_prompt_tokens": 300})
    assert workload_of(planned.settings, None, None) == Workload(3, 5, 300, 1000, 2000)
    assert workload_of(planned.settings, 100, 50) == Workload(3, 5, 100, 50, 2000)


def test_responses_end_where_a_sample_must() -> None:
    planned = job(MOE, sampling={"max_new_tokens": 50_000}, batch={"max_tokens": 4096})
    work = workload_of(planned.settings, 96, None)
    assert work.longest == 4000 and work.response == 2000

"""What a rank holds against a policy that is there, and what must hold of activations."""

from pathlib import Path

import pytest

from megatron_rl.plan.activations import kept_activations, layer_activations
from megatron_rl.plan.job import Job
from megatron_rl.plan.machine import find_machine
from megatron_rl.plan.memory import rank_memory
from megatron_rl.plan.plan import Plan
from megatron_rl.policy.policy import Policy
from tests.config.models import LATENT, MOE
from tests.plan.jobs import WORK, job
from tests.policy.single import opened, tiny_settings


def planned(policy: Policy) -> Job:
    return Job(policy.settings, policy.architecture, 1, find_machine("cpu"), WORK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_state_of_a_policy(dtype: str, distributed: bool, tmp_path: Path) -> None:
    """Weights, gradient buffers (padded by less than a page a buffer) and optimizer state, byte by byte."""
    settings = tiny_settings(tmp_path, precision={"dtype": dtype}, layout={"distributed_optimizer": distributed})
    with opened(settings) as policy:
        (rank,) = rank_memory(planned(policy))
        parameters = [parameter for _, parameter in policy.model.named_parameters()]
        assert sum(parameter.nbytes for parameter in parameters) == rank.weights
        buffers = [buffer for chunk in policy.model.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
        assert 0 <= gradients - rank.gradients <= 4096 * len(buffers)
        held = sum(tensor.nbytes for state in policy.optimizer.states() for tensor in state.tensors.values())
        assert held == rank.optimizer


def test_full_recomputation_keeps_inputs_alone() -> None:
    layout = {"tensor": 2, "pipeline": 2}
    full = rank_memory(job(MOE, 8, layout=layout, recompute={"mode": "full"}))
    inputs = 8192 / 2 * MOE.hidden * 2  # tokens of a tensor rank, in bfloat16
    for stage, flying in ((0, 2), (1, 1)):
        ends = 2 if stage == 0 else 3
        assert full[stage].activations == flying * inputs * (MOE.layers / 2 + ends)


@pytest.mark.parametrize("module", ["layernorm", "moe_act", "moe", "shared_experts", "mla_up_proj"])
def test_what_is_recomputed_is_not_kept(module: str) -> None:
    plain, less = (job(LATENT, recompute=r) for r in ({}, {"mode": "selective", "modules": [module]}))
    assert kept_activations(less, True) < kept_activations(plain, True)
    if module in ("moe_act", "moe", "shared_experts"):
        assert kept_activations(less, False) == kept_activations(plain, False)


@pytest.mark.parametrize("size", ["tensor", "context", "expert_tensor"])
def test_cutting_tokens_or_widths_leaves_less_on_a_rank(size: str) -> None:
    whole, cut = (sum(layer_activations(job(MOE, 16, layout={size: n}), True).values()) for n in (1, 4))
    if size == "expert_tensor":  # an expert's inputs come together on all ranks that share it
        assert cut > whole
    elif size == "context":
        assert cut == whole / 4
    else:
        assert cut < whole / 3


def test_a_peak_is_what_stands_in_its_row() -> None:
    for rank in Plan(job(LATENT, 16, layout={"tensor": 2, "pipeline": 4, "expert": 2, "pipeline_layers": [1, 3, 3, 1]})).ranks:
        training = rank.activations + max(rank.working, rank.head)
        assert rank.peak == rank.weights + rank.gradients + rank.optimizer + max(training, rank.publishing)

"""What the checks let through, Megatron-core does not refuse: its own configuration accepts every such combination."""

from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import check
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.settings import Settings
from megatron_rl.policy.transformer_config import build_transformer_config
from tests.config.models import DENSE, LATENT, MOE

MODULES = ["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
FEW = st.sampled_from([1, 1, 2, 4])
SECTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "policy": {"config": st.just("model")},
    "layout": {
        "tensor": FEW,
        "sequence_parallel": st.sampled_from([None, None, True, False]),
        "pipeline": FEW,
        "virtual_pipeline": st.sampled_from([1, 1, 2]),
        "pipeline_layers": st.sampled_from([None, None, (4, 4), (0, 5, 3, 0), (1, 2, 3, 2)]),
        "expert": FEW,
        "expert_tensor": FEW,
        "context": st.sampled_from([1, 2]),
    },
    "moe": {
        "dispatcher": st.sampled_from(["alltoall", "alltoall", "allgather"]),
        "aux_loss_coefficient": st.sampled_from([0.0, 0.01]),
        "expert_bias_update_rate": st.sampled_from([0.0, 0.0, 0.001]),
    },
    "precision": {"dtype": st.sampled_from(["float32", "bfloat16"])},
    "recompute": {
        "mode": st.sampled_from(["none", "selective", "full"]),
        "modules": st.lists(st.sampled_from(MODULES), max_size=2),
        "method": st.sampled_from(["uniform", "block"]),
        "layers": st.integers(1, 4),
    },
}


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(
    values=st.fixed_dictionaries({name: st.fixed_dictionaries(fields) for name, fields in SECTIONS.items()}),
    model=st.sampled_from([DENSE, MOE, LATENT]),
)
def test_megatron_accepts_what_passes_the_checks(values: dict[str, Any], model: Architecture) -> None:
    chosen = Settings.model_validate(values)
    assume(not check(chosen, model, smallest_world_size(chosen.layout)))
    build_transformer_config(model, chosen, cuda=False, transformer_engine=False)

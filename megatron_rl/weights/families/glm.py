"""GLM-4.5 (Air): biases in queries, keys and values, shared experts, a router with a choice bias."""

from megatron_rl.config.architecture import Architecture
from megatron_rl.weights.families.table import Form, Table, decoder


def glm4_moe(architecture: Architecture, form: Form) -> Table:
    return decoder(architecture, form)

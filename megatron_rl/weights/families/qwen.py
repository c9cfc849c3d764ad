"""Qwen2 and Qwen3, dense and with experts."""

from megatron_rl.config.architecture import Architecture
from megatron_rl.weights.families.table import Form, Table, decoder


def qwen(architecture: Architecture, form: Form) -> Table:
    """Qwen2 has biases in queries, keys and values, Qwen3 norms of queries and keys; the architecture says which."""
    return decoder(architecture, form)


def qwen3_moe(architecture: Architecture, form: Form) -> Table:
    return decoder(architecture, form)

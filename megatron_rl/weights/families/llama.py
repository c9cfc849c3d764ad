"""Llama, Mixtral, OLMoE."""

from megatron_rl.config.architecture import Architecture
from megatron_rl.weights.families.table import ExpertNames, Form, Table, decoder


def llama(architecture: Architecture, form: Form) -> Table:
    return decoder(architecture, form)


def mixtral(architecture: Architecture, form: Form) -> Table:
    """Its experts are w1 (gate), w3 (up) and w2 (down) of a block of their own."""
    expert = "block_sparse_moe.experts.{expert}."
    names = ExpertNames(router="block_sparse_moe.gate", gate=expert + "w1", up=expert + "w3", down=expert + "w2")
    return decoder(architecture, form, names)


def olmoe(architecture: Architecture, form: Form) -> Table:
    """Norms of queries and keys run over all heads together; the architecture says so."""
    return decoder(architecture, form)

"""DeepSeek-V2 and -V3, Moonlight, Kimi-K2: latent attention, shared experts, from V3 on a router with a choice bias."""

from megatron_rl.config.architecture import Architecture
from megatron_rl.weights.families.table import Form, Table, decoder


def deepseek(architecture: Architecture, form: Form) -> Table:
    return decoder(architecture, form)

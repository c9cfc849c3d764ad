"""One table of rules a model family. `table_of` finds it."""

from collections.abc import Callable, Mapping

from megatron_rl.config.architecture import Architecture
from megatron_rl.weights.families.deepseek import deepseek
from megatron_rl.weights.families.glm import glm4_moe
from megatron_rl.weights.families.llama import llama, mixtral, olmoe
from megatron_rl.weights.families.qwen import qwen, qwen3_moe
from megatron_rl.weights.families.table import Form, Table

TABLES: Mapping[str, Callable[[Architecture, Form], Table]] = {
    "llama": llama,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2": qwen,
    "qwen3": qwen,
    "qwen3_moe": qwen3_moe,
    "glm4_moe": glm4_moe,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "kimi_k2": deepseek,
}


def table_of(architecture: Architecture, form: Form) -> Table:
    """The rules of an architecture's family."""
    return TABLES[architecture.family](architecture, form)

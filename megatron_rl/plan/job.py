"""What is planned: the settings, the model, the ranks, the machine, and how much work a step brings."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.counting import Parameters, stage_parameters
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.layout_map import data_size, expert_data_size
from megatron_rl.config.settings import LayoutSettings, Settings
from megatron_rl.plan.machine import Machine

DEFAULT_PROMPT = 512  # tokens, where neither the settings nor the user say how long prompts are


@dataclass(frozen=True)
class Workload:
    """The responses of a training step. How long they get nobody knows before: lengths are what was told, or assumed."""

    groups: int
    group_size: int
    prompt: int  # mean tokens
    response: int  # mean tokens
    longest: int  # tokens of the longest response

    @property
    def sequences(self) -> int:
        return self.groups * self.group_size

    @property
    def sequence(self) -> int:
        """Mean tokens of a prompt with its response."""
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Of all sequences of a step."""
        return self.sequences * self.sequence

    @property
    def decay(self) -> float:
        """The exponent e of the share of responses longer than t, (1 - t/longest)^e, whose mean is `response`."""
        return self.longest / self.response - 1

    @property
    def attended(self) -> float:
        """Mean of length^2 over mean of length: the sequence that a token finds itself in. From the same shares."""
        second = 2 * self.longest**2 / ((self.decay + 1) * (self.decay + 2))  # E[response^2]
        return (self.prompt**2 + 2 * self.prompt * self.response + second) / self.sequence


@dataclass(frozen=True)
class Job:
    """A run, as a plan sees it."""

    settings: Settings
    architecture: Architecture
    world_size: int
    machine: Machine
    workload: Workload

    @property
    def layout(self) -> LayoutSettings:
        return self.settings.layout

    @cached_property
    def stages(self) -> list[Parameters]:
        """What a rank of each pipeline stage holds."""
        named = ("tensor", "expert", "expert_tensor", "pipeline", "virtual_pipeline", "pipeline_layers")
        return _held(self.architecture, **{name: getattr(self.layout, name) for name in named})

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Of each layer: does it hold experts?"""
        return self.architecture.moe_layers or (False,) * self.architecture.layers

    @property
    def nodes(self) -> int:
        """Machines of the policy."""
        return math.ceil(self.world_size / self.settings.cluster.gpus_per_node)

    @property
    def data(self) -> int:
        """Model replicas."""
        return data_size(self.layout, self.world_size)

    @property
    def expert_data(self) -> int:
        """Copies of each expert in a pipeline stage."""
        return expert_data_size(self.layout, self.world_size)

    @property
    def bytes(self) -> int:
        """Of a weight or an activation."""
        return 2 if self.settings.precision.dtype == "bfloat16" else 4

    @property
    def fp8(self) -> bool:
        """Do products really run in FP8? (Simulated ones are slower than bfloat16, on whatever machine.)"""
        return self.settings.precision.fp8 == "transformer_engine"

    @property
    def pack(self) -> int:
        """Tokens of a pack, padding included: the most that activations are made for."""
        return self.settings.batch.max_tokens

    @property
    def micro_batches(self) -> int:
        """Packs of a model replica in one optimizer step."""
        tokens = self.workload.tokens / self.settings.batch.minibatches
        packs = math.ceil(tokens / (self.data * self.pack * self.machine.costs.packing))
        multiple = self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1
        return max(1, math.ceil(packs / multiple)) * multiple

    @property
    def local(self) -> float:
        """Tokens of a full pack on a rank where norms and routers see them."""
        return self.context_tokens / (self.layout.tensor if self.layout.sequence_parallel_on else 1)

    @property
    def context_tokens(self) -> float:
        """Tokens of a full pack on a context rank: what attention's and dense products see."""
        return self.pack / self.layout.context


@cache
def _held(architecture: Architecture, **sizes: Any) -> list[Parameters]:
    """Kept, since a search over layouts asks again and again: by the sizes alone that matter."""
    return stage_parameters(LayoutSettings(**sizes), architecture)


def workload_of(settings: Settings, prompt: int | None, response: int | None) -> Workload:
    """The work of a step. Not told: prompts of data.max_prompt_tokens or 512, responses half as long as they may become."""
    sampling = settings.sampling
    longest = sampling.max_new_tokens
    if sampling.strategy in ("episodes", "turn_groups"):  # several turns in one sequence
        longest *= sampling.max_turns
    most = sampling.max_tokens or settings.batch.max_sequence or settings.batch.max_tokens
    if prompt is not None and prompt >= most:
        raise SettingsError(f"--prompt-tokens {prompt}: a prompt and its response have {most:,} tokens at most. Give fewer.")
    prompt = prompt or min(settings.data.max_prompt_tokens or DEFAULT_PROMPT, max(1, most // 2))
    longest = max(1, min(longest, most - prompt))
    if response is not None and response > longest:
        raise SettingsError(
            f"--response-tokens {response}: responses have {longest:,} tokens at most, with prompts of {prompt:,}. Give fewer, "
            "or raise sampling.max_new_tokens and batch.max_sequence."
        )
    return Workload(sampling.groups, sampling.group_size, prompt, response or math.ceil(longest / 2), longest)

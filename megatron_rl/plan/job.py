"""What is planned: the settings, the model, the ranks, the machine, and how much work a step brings."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.counting import Parameters, stage_parameters
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.layout_map import data_size, expert_data_size
from megatron_rl.config.learning_settings import SupervisedSettings
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
    supervised: bool = False  # responses are given, as `megatron-rl sft` learns them, and nobody samples

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
    def minibatches(self) -> int:
        """Parts of a step's sequences, an optimizer step each. Supervised fine-tuning knows none."""
        return 1 if self.workload.supervised else self.settings.batch.minibatches

    @property
    def updates(self) -> int:
        """Optimizer steps of a training step."""
        return 1 if self.workload.supervised else self.minibatches * self.settings.batch.epochs

    @property
    def micro_batches(self) -> int:
        """Packs of a model replica in one optimizer step."""
        tokens = self.workload.tokens / self.minibatches
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


def is_supervised(settings: Settings) -> bool:
    """Are these settings for `megatron-rl sft`? They word the responses, and nobody is rewarded: neither does anything in a run
    of reinforcement learning."""
    rewarded = settings.rewards or settings.sampling.environment is not None
    return settings.supervised != SupervisedSettings() and not rewarded


def workload_of(settings: Settings, prompt: int | None, response: int | None, *, supervised: bool | None = None) -> Workload:
    """The work of a step. Not told: prompts of data.max_prompt_tokens or 512, responses half as long as they may become, and
    supervised fine-tuning where the settings are for that."""
    supervised = is_supervised(settings) if supervised is None else supervised
    sampling, most = settings.sampling, settings.batch.max_sequence or settings.batch.max_tokens
    longest, raised = most, "batch.max_sequence"
    if not supervised:
        most, raised = sampling.max_tokens or most, "sampling.max_new_tokens and batch.max_sequence"
        turns = sampling.max_turns if sampling.strategy in ("episodes", "turn_groups") else 1  # several turns in one sequence
        longest = sampling.max_new_tokens * turns
    if prompt is not None and prompt >= most:
        raise SettingsError(f"--prompt-tokens {prompt}: a prompt and its response have {most:,} tokens at most. Give fewer.")
    prompt = prompt or min(settings.data.max_prompt_tokens or DEFAULT_PROMPT, max(1, most // 2))
    longest = max(1, min(longest, most - prompt))
    if response is not None and response > longest:
        raise SettingsError(
            f"--response-tokens {response}: responses have {longest:,} tokens at most, with prompts of {prompt:,}. Give fewer, "
            f"or raise {raised}."
        )
    groups, size = (settings.supervised.batch, 1) if supervised else (sampling.groups, sampling.group_size)
    return Workload(groups, size, prompt, response or math.ceil(longest / 2), longest, supervised)

"""Whether Megatron and transformers compute the same model from two checkpoints: their logits on random tokens.

Each side reads its own files with its own code, in float32, so an error of conversion cannot cancel out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.hf_config import read_hf_config
from megatron_rl.config.settings import Settings
from megatron_rl.policy.head import LogProbHead, Wanted
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.types import Sequence as TokenSequence

LENGTHS = (7, 60, 33, 20)  # of the random sequences


class LogitsHead(LogProbHead):
    """In the place of the log-probabilities: all logits, [1, local, vocab], whole on every tensor rank."""

    def __call__(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Wanted, **_: Any
    ) -> Tensor:
        group = self.layout.groups.tp
        weight = output_layer.weight if output_weight is None else output_weight  # [vocab/tp, hidden]
        if self.layout.settings.sequence_parallel_on:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        logits = torch.nn.functional.linear(hidden_states.squeeze(1), weight)  # [local, vocab/tp]
        return gather_from_tensor_model_parallel_region(logits, group=group)[None, :, : self.vocab]


def random_tokens(vocab: int, seed: int = 0) -> list[TokenSequence]:
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(0, vocab, length) for length in LENGTHS]
    return [TokenSequence(index, each, np.arange(len(each)) > 0) for index, each in enumerate(tokens)]


def policy_logits(policy: Policy, sequences: Sequence[TokenSequence]) -> dict[int, Tensor]:
    """[length, vocab] of each of this replica's sequences, on the ranks that see the loss. Without context parallelism."""
    head = policy.head
    policy.head = LogitsHead(policy.layout, policy.architecture.vocab, head.temperature, head.chunk)
    packs = policy.pack(sequences)
    outputs = policy.log_probs(packs, everywhere=True)
    policy.head = head
    found = {}
    for pack, output in zip(packs, outputs, strict=False):
        start = 0
        for sequence, padded in zip(pack.sequences, pack.padded_lengths, strict=False):
            found[sequence.index] = output.log_probs[start : start + sequence.length].float().cpu()
            start += padded
    return found


def transformers_logits(folder: Path, sequences: Sequence[TokenSequence]) -> dict[int, Tensor]:
    """The same by transformers, from a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    fields = dict(read_hf_config(folder).fields)
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{folder} is quantised, which transformers computes on a GPU alone: logits are compared of others"
        )
    kind = fields.pop("model_type")
    if kind == "deepseek_v2":
        raise CheckpointError(
            "transformers computes DeepSeek-V2 wrongly (it leaves out YaRN's factor in the softmax, and misreads group-limited "
            "routing), so its logits prove nothing. Use --verify without --verify-logits."
        )
    config = AutoConfig.for_model({"kimi_k2": "deepseek_v3"}.get(kind, kind), **fields)  # Kimi-K2 is DeepSeek-V3 renamed
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    with torch.no_grad():
        return {each.index: model(torch.from_numpy(each.tokens)[None], use_cache=False).logits[0] for each in sequences}


def difference(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> float:
    """The largest difference of two logits, as a share of the largest logit."""
    largest = max(float(logits.abs().max()) for logits in theirs.values())
    return max(float((ours[index] - theirs[index]).abs().max()) for index in theirs) / largest


def verify_logits(megatron: Path, hf: Path) -> float:
    """The difference between a policy that starts from `megatron` and transformers' model of `hf`, on one rank."""
    settings = Settings.model_validate(
        {
            "policy": {"init": megatron, "config": hf},
            "precision": {"dtype": "float32"},
            "batch": {"max_tokens": 256},
        }
    )
    policy = Policy.open(settings, Launch())
    sequences = random_tokens(policy.architecture.vocab)
    try:
        ours = policy_logits(policy, sequences)
    finally:
        policy.close()
    return difference(ours, transformers_logits(hf, sequences))

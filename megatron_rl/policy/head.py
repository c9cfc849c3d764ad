"""The end of the model: from hidden states to log-probabilities, without logits of the whole pack."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rl.policy.layout import Layout
from megatron_rl.policy.logprobs import fused_log_probs


@dataclass(frozen=True)
class Wanted:
    """Which log-probs the head computes: of `labels`, where `needed`, with the entropy or without."""

    labels: Tensor  # [local]
    needed: Tensor  # [local] bool
    entropy: bool


@dataclass(frozen=True)
class LogProbHead:
    """An `output_processor` for Megatron's GPTModel: hidden states in, [1 or 2, local] out (log-probs, entropy)."""

    layout: Layout
    vocab: int
    temperature: float
    chunk: int

    def __call__(
        self,
        *,
        hidden_states: Tensor,  # [local/tp under sequence parallelism, 1, hidden]
        output_layer: Any,
        output_weight: Tensor | None,
        context: Wanted,
        **_: Any,
    ) -> Tensor:
        for wait_for_weights in output_layer._forward_pre_hooks.values():  # what a call of the module would have done
            wait_for_weights(output_layer, ())
        weight = output_layer.weight if output_weight is None else output_weight  # [vocab/tp, hidden]
        sequence_parallel = self.layout.settings.sequence_parallel_on
        group = self.layout.groups.tp
        if sequence_parallel:
            # The tensor ranks' parts of the gradient are summed by the reduce-scatter that is this gather's backward.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        rows = weight.size(0)
        start = group.rank() * rows
        log_probs, entropy = fused_log_probs(
            hidden_states.squeeze(1),
            weight,
            context.labels,
            temperature=self.temperature,
            chunk=self.chunk,
            vocab_start=start,
            vocab_valid=max(0, min(rows, self.vocab - start)),
            group=group if group.size() > 1 else None,
            with_entropy=context.entropy,
            needed=context.needed,
            reduce_hidden_gradient=not sequence_parallel,
        )
        return torch.stack([log_probs] if entropy is None else [log_probs, entropy])

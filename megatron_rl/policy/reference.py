"""The frozen model that KL penalties and some surrogates compare with: this rank's first weights, kept beside the present ones.

They wait in host memory and change places with the policy's own for as long as it takes to score.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rl.policy.policy import Policy


class Reference:
    """The policy's weights at the moment it is made. Every rank makes its own."""

    def __init__(self, policy: Policy) -> None:
        policy.optimizer.gather_weights()
        self._policy = policy
        self._frozen = [tensor.detach().to("cpu", copy=True) for tensor in self._live()]

    def _live(self) -> list[Tensor]:
        """Weights, and the buffers that routing depends on."""
        parameters = [parameter.data for _, parameter in self._policy.model.named_parameters()]
        buffers = [b.data for chunk in self._policy.model.bare_chunks for b in chunk.buffers() if b.is_floating_point()]
        return parameters + buffers

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy scores as the reference. It must not be updated there."""
        self._policy.optimizer.gather_weights()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for live, waiting in zip(self._live(), self._frozen, strict=True):
                present = live.to("cpu", copy=True)
                live.copy_(waiting)
                waiting.copy_(present)

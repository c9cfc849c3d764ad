"""The routers' state that is not a parameter: the expert bias of auxiliary-loss-free balancing and the load behind it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.config.settings import MoeSettings
from megatron_rl.policy.model import Model
from megatron_rl.policy.modules import Router


@dataclass(frozen=True)
class RouterState:
    """Looks after the routers of a model's chunks on this rank."""

    model: Model

    def routers(self) -> list[Router]:
        return [module for chunk in self.model.bare_chunks for module in chunk.modules() if isinstance(module, Router)]

    def measure_load(self, settings: MoeSettings) -> bool:
        """Does anything in training depend on how many real tokens each expert gets?"""
        rates = (settings.aux_loss_coefficient, settings.z_loss_coefficient, settings.expert_bias_update_rate)
        return self.model.architecture.is_moe and any(rate > 0 for rate in rates)

    def snapshot(self) -> list[Tensor]:
        return [router.expert_bias.clone() for router in self.routers() if router.expert_bias is not None]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Take back an update of the biases, for a step that was skipped."""
        biased = [router for router in self.routers() if router.expert_bias is not None]
        with torch.no_grad():
            for router, bias in zip(biased, snapshot, strict=True):
                router.expert_bias.copy_(bias)
                router.local_tokens_per_expert.zero_()

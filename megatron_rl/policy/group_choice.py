"""Group-limited choice of experts with the family's own ranking of groups.

Experts are chosen from the groups that score highest: by their best expert (DeepSeek-V2) or by their two best (V3).
Megatron-core ranks a group by the sum of its top_k // top_k_groups best scores, which is V3's rule for V3's numbers and
nobody's for DeepSeek-V2's (6 experts from 3 groups).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from megatron_rl.config.architecture import Experts
from megatron_rl.policy.modules import Router

# Experts of a group whose scores are summed to rank it, by rule.
GROUP_BEST = {"max": 1, "top2_sum": 2}


def router_for(experts: Experts) -> Any:
    """Megatron's router where its ranking of groups is the family's, else one with the family's."""
    best = GROUP_BEST[experts.group_score]
    if experts.top_k_groups is None or experts.top_k // experts.top_k_groups == best:
        return Router
    return partial(GroupRankedRouter, best=best)


class GroupRankedRouter(Router):
    """A router that ranks a group of experts by the sum of its `best` highest scores."""

    router_replay: Any  # Megatron's, or a `_GroupChoice` while it stands in

    def __init__(self, *args: Any, best: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.best = best

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
        replay: RouterReplay | None = self.router_replay
        # Megatron leaves the choice to nothing but a replay; so this stands in for one, and asks the real one if there is.
        self.router_replay = _GroupChoice(self.best, replay)
        try:
            return super().routing(logits, padding_mask=padding_mask)
        finally:
            self.router_replay = replay


@dataclass(frozen=True)
class _GroupChoice:
    best: int
    replay: RouterReplay | None

    def get_replay_topk(self, scores: Tensor, topk: int, num_groups: int, group_topk: int, _: Any) -> Any:
        if self.replay is None:
            return self._choose(scores, topk, num_groups, group_topk)
        return self.replay.get_replay_topk(scores, topk, num_groups, group_topk, self._choose)

    def _choose(self, scores: Tensor, topk: int, num_groups: int, group_topk: int) -> tuple[Tensor, Tensor]:
        """The values and places of the chosen experts' scores: [tokens, experts] -> two [tokens, topk]."""
        by_group = scores.unflatten(1, (num_groups, -1))  # [tokens, groups, experts of a group]
        ranks = by_group.topk(self.best, dim=-1).values.sum(-1)  # [tokens, groups]
        kept = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, ranks.topk(group_topk, dim=-1).indices, True)
        chosen = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1).topk(topk, dim=-1)
        return chosen.values, chosen.indices

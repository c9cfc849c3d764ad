"""What ranks do in tests of weights: load, gather, export; and report what they hold."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.layout_map import rank_coordinates
from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.slices import model_slices
from megatron_rl.weights.gather import buckets, gather, plan_gather
from megatron_rl.weights.map import WeightMap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def held_differences(policy: Policy) -> list[str]:
    """Boxes that the weight map and the built model disagree about, on this rank."""
    layout = policy.settings.layout
    place = rank_coordinates(layout, policy.layout.world_size)[policy.layout.rank]
    planned = Counter(
        (h.rule.megatron, h.rule.shape, h.box, h.keeper) for h in WeightMap(policy.architecture).held(layout, place)
    )
    built = Counter(
        (s.name, tuple(s.shape), (tuple(s.offset), tuple(s.size)), s.saved_here)
        for s in model_slices(policy.model, policy.layout)
    )
    return [f"rank {policy.layout.rank}: map {each}" for each in (planned - built)] + [
        f"rank {policy.layout.rank}: model {each}" for each in (built - planned)
    ]


def gather_everywhere(
    launch: Launch, settings: dict[str, Any], bucket: int, targets: list[int]
) -> tuple[list[str], dict[str, Tensor], int]:
    """Assemble all HF tensors in buckets dealt to the target ranks, twice over.

    Returns where map and model disagree, this rank's tensors, and the most numbers that it got in a round.
    """
    policy = Policy.open(Settings(**settings), launch)
    weight_map = WeightMap(policy.architecture)
    cut = buckets(weight_map, weight_map.hf, bucket)
    rounds = [dict(zip(targets, cut[start:], strict=False)) for start in range(0, len(cut), len(targets))]
    rounds += [{target: cut[0] for target in targets}]  # several ranks may want the same
    plan = plan_gather(weight_map, policy.settings.layout, launch.world_size, rounds)
    dtype = DTYPES[policy.settings.precision.dtype]
    found: dict[str, Tensor] = {}
    most = 0
    slices = list(model_slices(policy.model, policy.layout))
    for tensors in gather(plan, slices, weight_map, dtype, torch.device("cpu")):
        most = max(most, sum(tensor.numel() for tensor in tensors.values()))
        for name, tensor in tensors.items():
            assert name not in found or torch.equal(found[name], tensor)
        found |= tensors
    dist.barrier()
    return held_differences(policy), found, most

"""The weights of a policy that trains, whatever ranks they are spread over."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.settings import LayoutSettings
from megatron_rl.weights.boxes import Slice
from megatron_rl.weights.gather import Round, gather, holding_alike, plan_gather
from megatron_rl.weights.map import WeightMap


class LiveWeights:
    """`slices` are asked for anew at each publish; they must be the finished weights of a step, and stay so meanwhile."""

    def __init__(
        self,
        weight_map: WeightMap,
        layout: LayoutSettings,
        world_size: int,
        slices: Callable[[], Iterable[Slice]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weight_map = weight_map
        self.dtype = dtype
        self.device = device
        self._layout = layout
        self._world_size = world_size
        self._slices = slices
        self._planned: tuple[object, list[Round]] = (None, [])  # the last plan: most publishes are like the one before

    def shares(self) -> Mapping[str, Mapping[int, int]]:
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for place, alike in holding_alike(self._layout, self._world_size):
            own: dict[str, int] = defaultdict(int)
            for held in self.weight_map.held(self._layout, place):
                for piece in self.weight_map.pieces(held.rule.megatron, held.box):
                    own[piece.hf] += prod(piece.hf_box[1])
            for name, numbers in own.items():
                found[name].update(dict.fromkeys(alike, numbers))
        return found

    def rounds(self, wanted: Sequence[Mapping[int, Sequence[str]]]) -> Iterator[dict[str, Tensor]]:
        if self._planned[0] != wanted:
            rounds = plan_gather(self.weight_map, self._layout, self._world_size, wanted, dist.get_rank())
            self._planned = wanted, rounds
        # Megatron is asked for the slices here, in the caller's thread; the boxes may travel in another.
        return gather(self._planned[1], list(self._slices()), self.weight_map, self.dtype, self.device)

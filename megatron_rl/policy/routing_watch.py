"""Watching which experts routers choose: where tokens go, and whether an update sends them elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.policy.layout import Layout
from megatron_rl.policy.modules import Router


@dataclass
class RoutingWatch:
    """What this rank's routers chose in one pass over packs: its own tokens of its own layers, padding left out."""

    # By layer, counted from 0 over the whole model, an entry a pack: [tokens, experts] bool.
    choices: dict[int, list[Tensor]] = field(default_factory=dict)
    _real: Tensor | None = None

    def see(self, real: Tensor) -> None:
        """The pass comes to a pack: which of the positions that routers see are no padding ([local] bool)."""
        self._real = real

    def note(self, layer: int, chosen: Tensor) -> None:
        assert self._real is not None, "a pass announces each pack"
        self.choices.setdefault(layer, []).append(chosen[self._real])

    def tokens(self, layout: Layout, experts: int) -> NDArray[np.int64]:
        """[moe layers, experts] tokens of the whole step that each expert was given. Every rank calls it."""
        own = {layer: torch.cat(chosen).sum(0).cpu().numpy() for layer, chosen in self.choices.items()}
        everyone = layout.everyone_has(own)
        layers = sorted({layer for each in everyone for layer in each})
        nothing = np.zeros(experts, np.int64)
        return np.array([sum((each.get(layer, nothing) for each in everyone), nothing) for layer in layers], dtype=np.int64)

    def changed(self, later: "RoutingWatch", layout: Layout) -> float:
        """Share of choices that a later pass over the same packs did not make again. Every rank calls it."""
        gone = total = 0
        for layer, before in self.choices.items():
            for old, new in zip(before, later.choices[layer], strict=True):
                gone += int((old & ~new).sum())
                total += int(old.sum())
        everyone = layout.everyone_has((gone, total))
        return sum(each[0] for each in everyone) / max(sum(each[1] for each in everyone), 1)


@contextmanager
def watched(routers: Sequence[Router]) -> Iterator[RoutingWatch]:
    """Inside, the watch hears every choice of these routers."""
    watch = RoutingWatch()

    def listen(router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        watch.note(int(router.layer_number) - 1, output[1].detach().bool())

    handles = [router.register_forward_hook(listen) for router in routers]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()

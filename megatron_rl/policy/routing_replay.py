"""Routing replay: routers choose the experts that they are told to, so that two passes over a token compute the same function.

Only the choice is replayed. Gate weights are taken from the live router's scores at the given experts, so the router learns
on. The choosing is Megatron-core's `RouterReplay`; what is added here is whose turn it is: which pack, which of a layer's
recomputations, and which of a rank's positions and layers.

    with replaying(routers, device, record=True) as first:      # a pass that chooses by itself, and writes it down
        ...
    with replaying(routers, device, first.routes) as second:    # passes that choose the same, in recomputed layers too
        ...
    second.differences(layout)                                  # how often they would have chosen otherwise

`given` is in one case what the trainer's own pass chose (R2), in the other what servers did (R3, `rollout_routes`).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import UserError
from megatron_rl.policy.batch import local_indices
from megatron_rl.policy.device import Device
from megatron_rl.policy.layout import Layout
from megatron_rl.policy.modules import Router
from megatron_rl.types import Pack

ONE_BYTE = 256  # experts that a byte can name


@dataclass(frozen=True)
class Routes:
    """The experts of one pack on this rank: of the positions that its routers see, in its layers. They wait in host memory."""

    experts: Mapping[int, Tensor]  # by layer, counted from 0 over the whole model: [tokens, top-k] uint8 or uint16
    known: Tensor | None = None  # [tokens] bool: at the others routers choose by themselves. None: all are known

    @property
    def bytes(self) -> int:
        tensors = [*self.experts.values(), *([self.known] if self.known is not None else [])]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class Differences:
    """How often routers, left alone, would have chosen otherwise than they were told. Sums over all ranks."""

    tokens: int  # tokens x layers that were told, padding left out
    tokens_differing: int  # of these, with any other expert
    choices: int  # tokens x layers x top-k
    choices_differing: int

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def shares(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}differs": self.tokens_differing / max(self.tokens, 1),
            f"{prefix}choices_differ": self.choices_differing / max(self.choices, 1),
        }


class RoutingReplay:
    """What the routers of this rank are told in passes over the same packs, and what is written down of them."""

    def __init__(self, given: Sequence[Routes] | None, record: bool, obey: bool, device: Device) -> None:
        self.given, self.record, self.device = given, record, device
        self.obeyed = given if obey else None
        self.pack: int | None = None  # that a forward pass is in; None: layers are recomputed, or nothing runs
        self.real: Tensor | None = None  # [tokens] of the positions that routers see in it: False on padding
        self.counts = torch.zeros(4, dtype=torch.int64, device=device.torch_device)  # as in Differences
        self._layers: list[_LayerReplay] = []
        self._packs = 0

    def begin(self, packs: int) -> None:
        """A pass begins. What was counted and written down of the one before is forgotten."""
        if self.given is not None and len(self.given) != packs:
            raise ValueError(f"routing of {len(self.given)} packs is given, and the pass is over {packs}")
        self._packs = packs
        self.counts.zero_()
        for layer in self._layers:
            layer.begin(packs)

    @contextmanager
    def forward(self, pack: int, real: Tensor) -> Iterator[None]:
        """Inside, a chunk's forward pass over this pack."""
        self.pack, self.real = pack, real
        try:
            yield
        finally:
            self.pack = self.real = None
        chosen = {layer: layer.chosen for layer in self._layers if layer.chosen is not None}
        if chosen:  # all layers at once: a GPU is waited for
            for layer, experts in zip(chosen, self.device.to_host(torch.stack([*chosen.values()])), strict=True):
                layer.recorded[pack], layer.chosen = experts, None

    @property
    def routes(self) -> list[Routes]:
        """What the last pass chose, an entry a pack."""
        return [Routes({layer.number: layer.recorded[pack] for layer in self._layers}) for pack in range(self._packs)]

    def differences(self, layout: Layout) -> Differences:
        """Of the last pass. Every rank calls it."""
        everyone = layout.everyone_has(self.counts.tolist())
        return Differences(*(sum(column) for column in zip(*everyone, strict=True)))

    def stand_in(self, router: Any) -> "_LayerReplay":
        layer = _LayerReplay(int(router.layer_number) - 1, int(router.config.num_moe_experts), self)
        self._layers.append(layer)
        return layer


class _LayerReplay(RouterReplay):
    """Megatron's replay of one router, told anew at each call what to do."""

    def __init__(self, number: int, experts: int, owner: RoutingReplay) -> None:
        super().__init__()
        # Megatron keeps one list for the process: routers of several models, or of several passes, must not meet in it.
        RouterReplay.global_router_replay_instances.remove(self)
        self.number, self.owner = number, owner
        self.compact = torch.uint8 if experts <= ONE_BYTE else torch.uint16
        self.chosen: Tensor | None = None  # [tokens, top-k] of the present pack
        self.recorded: list[Tensor] = []  # of each pack, in host memory
        self.backward: deque[int] = deque()  # packs that went forward, which schedules take back in the same order

    def begin(self, packs: int) -> None:
        self.recorded = [torch.empty(0)] * packs if self.owner.record else []
        self.backward.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Values and places of the chosen experts' scores: [tokens, experts] -> two [tokens, topk]."""
        arguments = (scores, topk, num_groups, group_topk, default_compute_topk)
        if self.owner.pack is None:
            return self._again(*arguments)
        pack = self.owner.pack
        self.backward.append(pack)
        if self.owner.given is not None:
            live = _choice(*arguments)
            told = self._told(self.owner.given[pack], len(scores), live)
            self._count(live, told, self.owner.given[pack].known)
        if self.owner.obeyed is not None:
            values, places = self._replayed(told, *arguments)
        else:
            self.set_router_replay_action(RouterReplayAction.RECORD)
            values, places = super().get_replay_topk(*arguments)
            self.clear_indices()
        if self.owner.record:
            self.chosen = places.to(self.compact)
        return values, places

    def _again(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Recomputation in the backward pass, which Megatron asks for pack by pack."""
        if self.owner.obeyed is None:
            self.clear_router_replay_action()
            return super().get_replay_topk(*arguments)
        routes = self.owner.obeyed[self.backward.popleft()]
        live = None if routes.known is None else _choice(*arguments)
        return self._replayed(self._told(routes, len(arguments[0]), live), *arguments)

    def _replayed(self, told: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        self.set_target_indices(told)
        self.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        values, places = super().get_replay_topk(*arguments)
        self.clear_indices()  # eight bytes a choice would wait for a backward pass that is told anew anyway
        return values, places

    def _told(self, routes: Routes, tokens: int, live: Tensor | None) -> Tensor:
        """[tokens, topk] int64: the given experts, and the router's own choice where none are known."""
        device, given = self.owner.device.torch_device, routes.experts[self.number]
        if len(given) != tokens:  # Megatron would take too few without a word
            raise ValueError(f"routing of {len(given)} tokens is given for a pack with {tokens}: it was of other packs")
        told = given.to(device, non_blocking=True).long()
        if routes.known is None or live is None:
            return told
        return torch.where(routes.known.to(device, non_blocking=True)[:, None], told, live)

    def _count(self, live: Tensor, told: Tensor, known: Tensor | None) -> None:
        assert self.owner.real is not None, "a pass announces each pack"
        counted = self.owner.real if known is None else self.owner.real & known.to(live.device, non_blocking=True)
        kept = (live[:, :, None] == told[:, None, :]).any(-1)  # [tokens, topk] own choices that were told too
        tokens = counted.sum()
        differing, gone = (~kept.all(1) & counted).sum(), (~kept & counted[:, None]).sum()
        self.owner.counts += torch.stack([tokens, differing, tokens * live.size(1), gone])


def _choice(scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Any) -> Tensor:
    """[tokens, topk] what a router would choose by itself."""
    with torch.no_grad():
        places: Tensor = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
    return places


@contextmanager
def replaying(
    routers: Sequence[Router],
    device: Device,
    given: Sequence[Routes] | None = None,
    *,
    record: bool = False,
    obey: bool = True,
) -> Iterator[RoutingReplay]:
    """Inside, these routers choose as they are told (by themselves without `given`), and it is written down with `record`.

    Without `obey` they choose by themselves, and are only compared with what is given.
    """
    replay = RoutingReplay(given, record, obey, device)
    former = [router.router_replay for router in routers]
    for router in routers:
        router.router_replay = replay.stand_in(router)
    try:
        yield replay
    finally:
        for router, before in zip(routers, former, strict=True):
            router.router_replay = before


def rollout_routes(pack: Pack, layout: Layout, model: Architecture, layers: Sequence[int]) -> Routes:
    """What a pack's sequences bring of the servers' routing, cut to this rank: its positions, these of the model's layers.

    Nothing is known of the last token of a sequence, which servers were never fed, nor of sequences without routing, nor of
    padding: there routers choose.
    """
    assert model.experts is not None
    dtype = np.uint8 if model.experts.count <= ONE_BYTE else np.uint16
    whole = np.zeros((pack.tokens, len(layers), model.experts.top_k), dtype)
    known = np.zeros(pack.tokens, np.bool_)
    start = 0
    for sequence, padded in zip(pack.sequences, pack.padded_lengths, strict=False):
        if sequence.routing is not None:
            _refuse_other_models(sequence.routing, model)
            whole[start : start + sequence.length - 1] = sequence.routing[:, list(layers)]
            known[start : start + sequence.length - 1] = True
        start += padded
    index = layout.sequence_part(torch.from_numpy(local_indices(pack, layout))).numpy()
    own, own_known = whole[index], known[index]  # [tokens, layers, top-k] and [tokens] that this rank's routers see
    _refuse_doubles(own[own_known], layers)
    by_layer = layout.device.to_host(torch.from_numpy(own.swapaxes(0, 1).copy()))  # [layers, tokens, top-k]
    return Routes(dict(zip(layers, by_layer, strict=True)), layout.device.to_host(torch.from_numpy(own_known)))


def _refuse_other_models(routing: NDArray[Any], model: Architecture) -> None:
    assert model.experts is not None
    expected = (model.layers, model.experts.top_k)
    if routing.shape[1:] != expected or (routing.size and int(routing.max()) >= model.experts.count):
        raise UserError(
            f"the bank's routing is of {routing.shape[1]} layers with {routing.shape[2]} experts a token, the largest number "
            f"{int(routing.max(initial=0))}; the policy has {expected[0]} layers, {expected[1]} of {model.experts.count} "
            "experts. Fill the bank with servers of the policy's model, or set objective.routing_replay=policy."
        )


def _refuse_doubles(routing: NDArray[Any], layers: Sequence[int]) -> None:
    """An expert that stands twice leaves another out: that is not what a server did, but a place it forgot.

    routing: [tokens, layers, top-k].
    """
    ordered = np.sort(routing, axis=-1)
    doubled = (ordered[..., 1:] == ordered[..., :-1]).any(axis=(0, 2))  # [layers]
    if doubled.any():
        raise UserError(
            f"the bank's routing names an expert twice for a token, in layer {layers[int(doubled.argmax())]}, as no router "
            "chooses. Fill the bank anew, or set objective.routing_replay=policy."
        )

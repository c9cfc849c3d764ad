"""Differentiable collectives, each with the backward pass that its use needs."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class GatherRanks(torch.autograd.Function):
    """[n, ...] on each rank -> [ranks, n, ...] everywhere; the gradient of a rank's part is summed over all who used it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class SumOverRanks(torch.autograd.Function):
    """All-reduce whose every input feeds every rank's output: the gradient is summed back over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum over a group, where every rank's own loss depends on it."""
    return cast(Tensor, SumOverRanks.apply(x, group)) if group.size() > 1 else x


class SumOfOwnParts(torch.autograd.Function):
    """All-reduce whose result enters one loss that all ranks compute alike: each part takes the gradient as it stands."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def sum_of_own_parts(x: Tensor, group: Any) -> Tensor:
    """The sum over a group, where ranks hold parts of one whole and compute one loss together."""
    return cast(Tensor, SumOfOwnParts.apply(x, group)) if group.size() > 1 else x

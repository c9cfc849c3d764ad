"""What every carrying out needs: the weights, what is sent of them, the other ranks, who wants to know how far we are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_rl.weights.publish.plan import Plan
from megatron_rl.weights.publish.ports import Ranks, Weights
from megatron_rl.weights.publish.waiting import in_thread
from megatron_rl.weights.publish.wire import Wire

Tell = Callable[[int, int], None]  # buckets done, buckets in all


@dataclass(frozen=True)
class Crew:
    weights: Weights
    wire: Wire
    ranks: Ranks
    tell: Tell

    async def alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A blocking call among ranks. One at a time and in the same order on all of them."""
        return await in_thread(self.weights.device, function, *arguments)

    def assembled(self, plan: Plan) -> Iterator[dict[str, Tensor]]:
        return self.weights.rounds(plan.rounds)

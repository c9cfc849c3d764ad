"""An objective as a user would write it, outside of the package."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from megatron_rl.objectives.base import ObjectiveResult, TokenBatch
from megatron_rl.objectives.compose import Needs, SequenceSurrogate, Terms


@dataclass(frozen=True, kw_only=True)
class Reinforce(SequenceSurrogate):
    """A · mean log-prob, times a scale."""

    name: ClassVar[str] = "reinforce"

    scale: Annotated[float, "By how much"] = 1.0

    def needs(self) -> Needs:
        return Needs(scalars=frozenset({"advantage"}))

    def terms(self, batch: TokenBatch) -> Terms:
        return Terms(self.scale * batch.scalars["advantage"] * batch.mean_tokens(batch.log_probs))


class Bare:
    """The least that a policy takes: a callable that says whether it wants entropy."""

    needs_entropy = False

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        return ObjectiveResult(-batch.sum_sequences(batch.log_probs).sum() / max(batch.divisors.tokens, 1), {})


class Nothing:
    """Not an objective."""


NUMBER = 3

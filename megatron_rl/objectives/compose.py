"""An objective is put together from parts: one surrogate, any weights, any penalties.

    loss = −(1/D) Σ_i f_i Σ_t f_it J_it  +  Σ penalties

J the surrogate's terms (of tokens, or one a sequence), f the product of the weights, detached, D the global divisor of the
surrogate's aggregation. Where a weight is zero the term is dropped: neither value nor gradient is looked at.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from megatron_rl.objectives.aggregate import Aggregation, aggregate
from megatron_rl.objectives.base import GroupTable, Metric, ObjectiveResult, TokenBatch
from megatron_rl.objectives.metrics import always

Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Needs:
    """What a part must be given beside log-probs and lengths."""

    entropy: bool = False
    columns: frozenset[str] = frozenset()  # [tokens]: old, rollout, reference …
    scalars: frozenset[str] = frozenset()  # [count]: advantage …
    groups: bool = False  # the two passes of `GroupObjective`

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.entropy or other.entropy,
            self.columns | other.columns,
            self.scalars | other.scalars,
            self.groups or other.groups,
        )


class Demanding:
    """Whatever has needs, seen one by one."""

    def needs(self) -> Needs:
        return Needs()

    @property
    def needs_entropy(self) -> bool:
        return self.needs().entropy

    @property
    def needs_columns(self) -> frozenset[str]:
        return self.needs().columns

    @property
    def needs_scalars(self) -> frozenset[str]:
        return self.needs().scalars

    @property
    def needs_reference(self) -> bool:
        return "reference" in self.needs().columns

    @property
    def reads_groups(self) -> bool:
        return self.needs().groups


class Part(Demanding):
    """A surrogate, weight or penalty: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    kind: ClassVar[str]

    def statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """[count] each, detached: what it must know of every sequence of a group (see `base.GroupObjective`)."""
        return {}

    def prepare(self, table: GroupTable) -> dict[str, Tensor]:
        """[N] each: the scalars it reads, made of the whole step's table."""
        return {}


def require_positive(part: Part, *names: str) -> None:
    """Refuse options that must be above zero and are not."""
    for name in names:
        if not getattr(part, name) > 0:
            raise ValueError(f"{part.name}: {name}={getattr(part, name)} must be above 0")


def require_not_negative(part: Part, *names: str) -> None:
    """Refuse options that are below zero: a bound of a clip on the wrong side of 1, a penalty that rewards."""
    for name in names:
        if not getattr(part, name) >= 0:
            raise ValueError(f"{part.name}: {name}={getattr(part, name)} must not be below 0")


@dataclass(frozen=True)
class Terms:
    """What a surrogate says of a micro-batch, to be maximised."""

    values: Tensor  # [tokens] when the surrogate's level is "token", else [count]; with gradient
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Surrogate(Part, ABC):
    """The heart of an objective, itself an objective: without weights and penalties."""

    kind: ClassVar[str] = "surrogate"
    on_policy_only: ClassVar[bool] = False  # has no ratio to the policy that sampled
    includes: ClassVar[tuple[str, ...]] = ()  # the weights whose work it does itself

    @property
    def reads_token_advantages(self) -> bool:
        """Does it take the column `token_advantage` where there is one?"""
        return False

    @property
    @abstractmethod
    def level(self) -> Level:
        """Whether `terms` gives one value a token or one a sequence (already a mean over its tokens, if that is wanted)."""

    @abstractmethod
    def terms(self, batch: TokenBatch) -> Terms:
        """J's summands. The batch is clean: float32, zeros outside the mask."""

    def mean(self, sums: Tensor, batch: TokenBatch) -> Tensor:
        """Scalar: from one number a sequence ([count]) to this micro-batch's part of J. By default (1/N) Σ_i."""
        return sums.sum() / max(batch.divisors.sequences, 1)

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        return ComposedObjective(self)(batch)


class SequenceSurrogate(Surrogate):
    """One value a sequence; J is their mean over all sequences that count."""

    @property
    def level(self) -> Level:
        return "sequence"


@dataclass(frozen=True, kw_only=True)
class TokenSurrogate(Surrogate):
    """One value a token, brought together by the option `aggregation`."""

    aggregation: Annotated[Aggregation, "What the terms are divided by"] = "sequence_mean"
    constant: Annotated[float, "c of aggregation=constant"] = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "constant")

    @property
    def level(self) -> Level:
        return "token"

    @property
    def reads_token_advantages(self) -> bool:
        return True

    def mean(self, sums: Tensor, batch: TokenBatch) -> Tensor:
        return aggregate(sums, batch, self.aggregation, self.constant)


class Weight(Part, ABC):
    """A detached factor; zero drops what it stands at."""

    kind: ClassVar[str] = "weight"
    level: ClassVar[Level]  # factors [tokens] or [count]
    off_policy_only: ClassVar[bool] = False  # without effect where `old` is the policy itself

    @abstractmethod
    def factors(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Factors, and metrics about them. Called without gradient, on a clean batch."""


class LossPenalty(Part, ABC):
    """Something added to the loss."""

    kind: ClassVar[str] = "penalty"
    place: ClassVar[str] = "loss"

    @abstractmethod
    def loss(self, batch: TokenBatch) -> tuple[Tensor, Mapping[str, Metric]]:
        """Scalar to be added (coefficient and divisor included), and metrics. The batch is clean."""


class RewardPenalty(Part, ABC):
    """Something that changes rewards before advantages are taken. Pure, on whole vectors, outside of the loss."""

    kind: ClassVar[str] = "penalty"
    place: ClassVar[str] = "reward"

    @abstractmethod
    def adjust(self, rewards: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """[N] -> [N]. `statistics` are what `statistics(batch)` gave, gathered."""


@dataclass(frozen=True)
class ComposedObjective(Demanding):
    """The objective that is handed to a policy.

    `on_policy` says that there is one optimizer step a rollout: `old` is then the policy itself, detached, the ratio is
    exactly 1 in value, and no pass for old log-probs is needed. `old_is_rollout` says that `old` is what the rollout engine
    reported: the two then have no mismatch to report.
    """

    surrogate: Surrogate
    weights: Sequence[Weight] = ()
    penalties: Sequence[LossPenalty] = ()
    reward_penalties: Sequence[RewardPenalty] = ()
    on_policy: bool = False
    old_is_rollout: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.surrogate, *self.weights, *self.penalties, *self.reward_penalties)

    def needs(self) -> Needs:
        total = Needs()
        for part in self.parts:
            total = total | part.needs()
        return replace(total, columns=total.columns - {"old"}) if self.on_policy else total

    def statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """[count] each, of a forward pass: what the parts and the reward penalties must know of every sequence."""
        batch = self._seen(batch)
        with torch.no_grad():
            return {k: v for part in self.parts for k, v in part.statistics(batch).items()}

    def prepare(self, table: GroupTable) -> dict[str, Tensor]:
        """[N] each, from the whole step's table."""
        return {k: v for part in self.parts for k, v in part.prepare(table).items()}

    def adjust_rewards(self, rewards: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        """[N] Rewards as the advantage shall see them."""
        for penalty in self.reward_penalties:
            rewards = penalty.adjust(rewards, lengths, statistics)
        return rewards

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        batch = self._seen(batch)
        self._require(batch)
        metrics: dict[str, Metric] = {}
        tokens, sequences = self._factors(batch, metrics)
        terms = self.surrogate.terms(_without_dropped(batch, tokens, sequences))
        metrics.update(terms.metrics)
        by_token = self.surrogate.level == "token"
        sums = batch.sum_sequences(_times(tokens, terms.values)) if by_token else terms.values  # [count]
        loss = -self.surrogate.mean(torch.where(batch.counts, _times(sequences, sums), 0.0), batch)
        for penalty in self.penalties:
            extra, more = penalty.loss(batch)
            loss = loss + extra
            metrics.update(more)
        return ObjectiveResult(loss, always(batch, old_is_rollout=self.old_is_rollout) | metrics)

    def _seen(self, batch: TokenBatch) -> TokenBatch:
        batch = batch.cleaned()
        return replace(batch, columns={**batch.columns, "old": batch.log_probs.detach()}) if self.on_policy else batch

    def _require(self, batch: TokenBatch) -> None:
        needs = self.needs()
        columns = needs.columns - batch.columns.keys()
        scalars = needs.scalars - batch.scalars.keys()
        if self.surrogate.reads_token_advantages and "token_advantage" in batch.columns:
            scalars -= {"advantage"}
        entropy = {"entropy"} if needs.entropy and batch.entropy is None else set()
        if columns or scalars or entropy:
            missing = ", ".join(
                [f"column '{c}'" for c in sorted(columns)] + [f"scalar '{s}'" for s in sorted(scalars)] + [*entropy]
            )
            raise ValueError(
                f"{' + '.join(part.name for part in self.parts)} was not given: {missing}. Put columns and scalars into the "
                "sequences, or pass columns to Policy.update."
            )

    def _factors(self, batch: TokenBatch, metrics: dict[str, Metric]) -> tuple[Tensor | None, Tensor | None]:
        """Products of the weights' factors: of tokens, of sequences."""
        products: dict[Level, Tensor | None] = {"token": None, "sequence": None}
        with torch.no_grad():
            for weight in self.weights:
                factors, more = weight.factors(batch)
                products[weight.level] = _times(products[weight.level], factors)
                metrics.update(more)
        return products["token"], products["sequence"]


def _times(factors: Tensor | None, values: Tensor) -> Tensor:
    """The product; zero wherever the factor is, whatever the value is there."""
    return values if factors is None else torch.where(factors == 0, 0.0, factors * values)


def _without_dropped(batch: TokenBatch, tokens: Tensor | None, sequences: Tensor | None) -> TokenBatch:
    """No gradient reaches the log-probs of what was dropped, not even the NaN of an overflow."""
    dropped = None if tokens is None else tokens == 0  # [tokens]
    if sequences is not None:
        whole = batch.spread((sequences == 0).to(batch.lengths.dtype)) > 0
        dropped = whole if dropped is None else dropped | whole
    if dropped is None:
        return batch
    return replace(batch, log_probs=torch.where(dropped, batch.log_probs.detach(), batch.log_probs))

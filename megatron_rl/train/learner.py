"""One training step on what is in the bank: old log-probs, advantages, minibatches.

    rows → minibatches of whole groups → packs → old (and reference) log-probs → advantages → updates × epochs

Every rank runs it. Order matters in one place: penalties in the reward may need log-probs, advantages need rewards.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.config.errors import UserError
from megatron_rl.config.settings import Settings
from megatron_rl.data.packing import CostModel
from megatron_rl.objectives.advantages import Advantage
from megatron_rl.objectives.base import Objective
from megatron_rl.objectives.compose import ComposedObjective
from megatron_rl.objectives.gtpo import CONFLICT
from megatron_rl.policy.group_pass import gather_statistics, prepare_groups
from megatron_rl.policy.policy import Policy, UpdateReport
from megatron_rl.policy.reference import Reference
from megatron_rl.policy.routing_replay import Differences, Routes, RoutingReplay
from megatron_rl.policy.routing_watch import RoutingWatch
from megatron_rl.train.clock import Clock
from megatron_rl.train.experience import ROLLOUT, Experience, Rows, advantages_of
from megatron_rl.train.look import Look, look
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence

INITIAL_ENTROPY = "initial_entropy"

type Columns = dict[str, list[Tensor]]  # per-token numbers by name, a tensor a pack


@dataclass(frozen=True)
class Minibatch:
    """One optimizer step's packs of this replica, with what was scored on them before any update."""

    packs: list[Pack]
    columns: Columns
    routing: RoutingWatch | None = None  # of the pass that scored `old`
    routes: list[Routes] | None = None  # that updates replay, on this rank; None: routers choose anew
    rollout: Differences | None = None  # of the trainer's routers and the servers', in the pass that scored `old`


@dataclass(frozen=True)
class LearnReport:
    """What a training step did. The same on every rank."""

    updates: Sequence[UpdateReport]
    metrics: Mapping[str, float]
    tokens: int  # of all samples, prompts included
    written: int  # of these, the ones that count
    flops: float  # of one forward pass over all of them
    look: Look | None = None


class Learner:
    """Learns from sealed steps."""

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        advantage: Advantage | None,
        settings: Settings,
        reference: Reference | None = None,
    ) -> None:
        self.policy, self.objective, self.advantage, self.settings = policy, objective, advantage, settings
        self.reference = reference
        self.initial_entropy: float | None = None  # of the first model, once known; part of a run's state
        self._parts = objective if isinstance(objective, ComposedObjective) else None
        self._replay = settings.objective.routing_replay

    def learn(self, step: int, rows: Rows, clock: Clock | None = None, *, traces: int | None = None) -> LearnReport:
        """All minibatches of all epochs. A function of the weights, the rows and the step's number alone.

        With `traces` the first minibatch is looked at when all is done, and so many of its groups token by token.
        """
        clock = clock or Clock()
        experience = Experience.read(rows)
        if self._replay == "rollout" and experience.without_routing() == 1:
            raise UserError(
                f"objective.routing_replay = rollout: the bank has no routing of step {step}, whose servers did not return it. "
                "Set objective.routing_replay=policy, or sample the step anew."
            )
        seed = (self.settings.run.seed, step)
        with clock.phase("old"):
            parts = experience.minibatches(self.settings.batch.minibatches, seed)
            minibatches = [self._scored(experience, part, watch=traces is not None) for part in parts]
        metrics = experience.metrics(step) | self._replay_metrics(experience, minibatches)
        if self._parts is not None and INITIAL_ENTROPY in self._parts.needs_scalars:
            minibatches = self._with_initial_entropy(minibatches)
        if self.advantage is not None:
            rewards = self._adjusted_rewards(experience, minibatches)
            advantages = advantages_of(self.advantage, experience, rewards)
            metrics |= advantages.metrics(experience)
            if self._parts is not None and CONFLICT in self._parts.needs_columns:
                advantages = advantages.with_conflicts(experience)
            minibatches = [_mapped(minibatch, advantages.inform) for minibatch in minibatches]
        updates: list[UpdateReport] = []
        with clock.phase("update"):
            for epoch in range(self.settings.batch.epochs):
                order = (
                    np.random.default_rng([*seed, epoch]).permutation(len(minibatches)) if epoch else range(len(minibatches))
                )
                updates += [self._update(minibatches[number]) for number in order]
        metrics = {**metrics, **_mean([update.metrics for update in updates]), **_summary(updates)}
        seen = None
        if traces is not None:
            with clock.phase("look"):
                seen = self._look(minibatches[0], experience.of_first_groups(parts[0], traces))
            metrics |= seen.metrics
        flops = float(CostModel.of(self.policy.architecture).cost(experience.lengths).sum())
        return LearnReport(updates, metrics, int(experience.lengths.sum()), int(experience.loss_tokens.sum()), flops, seen)

    # -- before the first update ---------------------------------------------------------------------------------------

    def _scored(self, experience: Experience, rows: NDArray[np.int64], *, watch: bool) -> Minibatch:
        """Packs of a minibatch, and the log-probs that its objective reads, with the weights as they are."""
        lengths = experience.lengths[rows].tolist()
        returned = self.settings.keeps_routing

        def read(positions: Sequence[int]) -> list[TokenSequence]:
            return experience.sequences([int(rows[position]) for position in positions], routing=returned)

        packs = self.policy.pack_lengths(lengths, read)
        routes = self.policy.rollout_routes(packs) if returned else None
        packs = _mapped(Minibatch(packs, {}), _without_routing).packs  # of all layers and ranks: too much to keep
        wanted = self._parts.needs_columns if self._parts is not None else frozenset({"old"})
        columns: Columns = {}
        routing = rollout = None
        if "old" in wanted and self.settings.objective.old_log_probs == "recompute":
            with self.policy.watching() if watch else nullcontext() as routing, self._first(routes) as replay:
                columns["old"] = [values.log_probs for values in self.policy.log_probs(packs)]
            if replay is not None:
                rollout = replay.differences(self.policy.layout) if returned else None
                # Where servers are repeated: theirs and, where there was none, the trainer's own.
                routes = replay.routes if replay.record else None
        if "old" in wanted and self.settings.objective.old_log_probs == "rollout":
            packs = _mapped(Minibatch(packs, {}), _rollout_as_old).packs
        if self.reference is not None:
            with self.reference.in_place():
                columns["reference"] = [values.log_probs for values in self.policy.log_probs(packs)]
        return Minibatch(packs, columns, routing, routes if self._replay != "off" else None, rollout)

    def _first(self, returned: Sequence[Routes] | None) -> AbstractContextManager[RoutingReplay | None]:
        """Around the pass of `old`, which repeats the servers' choices, or is compared with them where they returned them."""
        if self._replay == "off" and returned is None:
            return nullcontext()
        return self.policy.replaying(returned, record=self._replay != "off", obey=self._replay == "rollout")

    def _replaying(self, routes: Sequence[Routes] | None) -> AbstractContextManager[RoutingReplay | None]:
        """Around a pass of the policy, whose routers then repeat these choices; the reference always makes its own."""
        return nullcontext() if self._replay == "off" else self.policy.replaying(routes)

    def _replay_metrics(self, experience: Experience, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        """What the fullest rank holds for replay and, of the servers' routing, what is missing and what differs."""
        found: dict[str, float] = {}
        if self._replay != "off":
            held = sum(routes.bytes for minibatch in minibatches for routes in minibatch.routes or ())
            found["replay/bytes"] = float(max(self.policy.layout.everyone_has(held)))
        if self.settings.keeps_routing:
            found["replay/missing"] = experience.without_routing()
        differences = [each.rollout for each in minibatches if each.rollout is not None and each.rollout.tokens]
        return found | (sum(differences[1:], differences[0]).shares("replay/rollout_") if differences else {})

    def _with_initial_entropy(self, minibatches: Sequence[Minibatch]) -> list[Minibatch]:
        """GTPO asks how sure the first model was of itself: the mean entropy of its tokens, taken before the first update."""
        if self.initial_entropy is None:
            self.initial_entropy = self._mean_entropy(minibatches)
        entropy = self.initial_entropy

        def informed(sequence: TokenSequence) -> TokenSequence:
            return replace(sequence, scalars={**sequence.scalars, INITIAL_ENTROPY: entropy})

        return [_mapped(minibatch, informed) for minibatch in minibatches]

    def _mean_entropy(self, minibatches: Sequence[Minibatch]) -> float:
        """Over all tokens of the step that count."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.policy.layout.device.torch_device)
        for minibatch in minibatches:
            with self._replaying(minibatch.routes):
                values = self.policy.log_probs(minibatch.packs, entropy=True)
            known = self.policy.per_sequence(minibatch.packs, [each.entropy for each in values if each.entropy is not None])
            for sequence in (sequence for pack in minibatch.packs for sequence in pack.sequences):
                totals[0] += float(known[sequence.index][sequence.loss_mask].sum(dtype=np.float64))
                totals[1] += sequence.loss_tokens
        total, count = self.policy.layout.sum_over_data(totals).tolist()
        return total / max(count, 1)

    def _adjusted_rewards(self, experience: Experience, minibatches: Sequence[Minibatch]) -> NDArray[np.float64]:
        """[rows] rewards after the penalties in the reward, which may need statistics of the scored log-probs."""
        penalties = self._parts.reward_penalties if self._parts is not None else ()
        if not penalties:
            return experience.rewards
        assert self._parts is not None
        statistics: dict[str, NDArray[np.float64]] = {}
        if any(penalty.needs_columns for penalty in penalties):
            for minibatch in minibatches:
                with self._replaying(minibatch.routes):
                    gathered = gather_statistics(self.policy, minibatch.packs, self._parts, minibatch.columns)
                for name, values in gathered.items():
                    whole = statistics.setdefault(name, np.zeros(len(experience.rewards)))
                    for index, value in values.items():
                        whole[index] = value
        rewards, lengths = torch.from_numpy(experience.rewards), torch.from_numpy(experience.loss_tokens)
        named = {name: torch.from_numpy(values) for name, values in statistics.items()}
        for penalty in penalties:
            rewards = penalty.adjust(rewards, lengths, named)
        return rewards.double().numpy()

    # -- updates -------------------------------------------------------------------------------------------------------

    def _update(self, minibatch: Minibatch) -> UpdateReport:
        with self._replaying(minibatch.routes) as replay:
            report = self.policy.update(self._prepared(minibatch), self.objective, minibatch.columns)
            if replay is None:
                return report
            return replace(report, metrics={**report.metrics, **replay.differences(self.policy.layout).shares("replay/")})

    def _prepared(self, minibatch: Minibatch) -> list[Pack]:
        """The packs as the objective reads them, with the present weights."""
        if self._parts is None or not self._parts.reads_groups:
            return minibatch.packs
        return prepare_groups(self.policy, minibatch.packs, self._parts, minibatch.columns)

    def _look(self, minibatch: Minibatch, traced: Mapping[int, str]) -> Look:
        with self._replaying(minibatch.routes) as replay:
            packs = self._prepared(minibatch)
            before = minibatch.routing if replay is None else None  # what is replayed does not change
            return look(self.policy, self.objective, packs, minibatch.columns, before, traced)


def _mapped(minibatch: Minibatch, change: Callable[[TokenSequence], TokenSequence]) -> Minibatch:
    """The same packs with changed sequences; what was scored on them still fits."""
    packs = [replace(pack, sequences=tuple(map(change, pack.sequences))) for pack in minibatch.packs]
    return replace(minibatch, packs=packs)


def _without_routing(sequence: TokenSequence) -> TokenSequence:
    return replace(sequence, routing=None)


def _rollout_as_old(sequence: TokenSequence) -> TokenSequence:
    return replace(sequence, columns={**sequence.columns, "old": sequence.columns[ROLLOUT]})


def _summary(updates: Sequence[UpdateReport]) -> dict[str, float]:
    """Of the step's updates as a whole."""
    return {
        "loss": float(np.mean([update.loss for update in updates])),
        "grad_norm": float(np.mean([update.grad_norm for update in updates])),
        "skipped_updates": float(sum(not update.applied for update in updates)),
    }


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the step's updates, each of which weighs the same."""
    return {name: float(np.mean([each[name] for each in metrics])) for name in (metrics[0] if metrics else {})}

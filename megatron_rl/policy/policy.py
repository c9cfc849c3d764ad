"""The policy: a Megatron-core model that can be asked for log-probabilities and improved by an objective.

It knows no algorithm. `log_probs(packs)` scores, `update(packs, objective)` takes one optimizer step, `save` and `load` keep
its state; all under any parallel layout, with the same result. Every rank calls the same methods in the same order, with
the packs of its own model replica.
"""

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import require_valid
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import alignment
from megatron_rl.config.settings import Settings
from megatron_rl.data.packing import CostModel, Plan, build_pack, build_packs, level_packs, plan_packs
from megatron_rl.objectives.base import Divisors, Objective, ObjectiveResult, TokenBatch
from megatron_rl.policy.batch import PackTensors, local_indices, pack_tensors
from megatron_rl.policy.head import LogProbHead, Wanted
from megatron_rl.policy.layout import Launch, Layout
from megatron_rl.policy.model import Model, bare, build_model, let_go
from megatron_rl.policy.optimizer import Optimizer
from megatron_rl.policy.pretrained import load_pretrained
from megatron_rl.policy.reduction import reduce_results
from megatron_rl.policy.routers import RouterState
from megatron_rl.policy.routing_replay import Routes, RoutingReplay, replaying, rollout_routes
from megatron_rl.policy.routing_watch import RoutingWatch, watched
from megatron_rl.types import Pack
from megatron_rl.types import Sequence as TokenSequence


@dataclass(frozen=True)
class TokenValues:
    """Numbers for the predictions of one pack, where they are used: on the ranks that see the loss, this rank's positions."""

    log_probs: Tensor  # [local] float32
    entropy: Tensor | None = None  # [local]


@dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did. The same on every rank."""

    loss: float
    grad_norm: float
    metrics: Mapping[str, float]
    applied: bool  # False: a non-finite loss or gradient, the weights are untouched
    step: int  # optimizer steps applied so far
    skipped: int  # optimizer steps skipped so far


class Policy:
    """A model spread over ranks, with its optimizer."""

    def __init__(self, settings: Settings, architecture: Architecture, layout: Layout) -> None:
        self.settings = settings
        self.architecture = architecture
        self.layout = layout
        self.model: Model = build_model(architecture, settings, layout)
        if settings.policy.init != "random":
            load_pretrained(self.model, layout, Path(settings.policy.init))
        self.optimizer = Optimizer(self.model, settings, layout)
        self.routers = RouterState(self.model)
        self.head = LogProbHead(layout, architecture.vocab, settings.policy.temperature, settings.policy.log_prob_chunk)
        self.steps = 0
        self.skipped = 0
        self._watch: RoutingWatch | None = None
        self._replay: RoutingReplay | None = None
        self.model.config.finalize_model_grads_func = partial(_finalize_without_scaling, groups=layout.groups)
        for chunk in self.model.chunks:
            chunk.train()

    @classmethod
    def open(cls, settings: Settings, launch: Launch | None = None) -> Self:
        """Check the settings against the model and the launched ranks, join the ranks, build the model."""
        launch = launch or Launch.from_environment()
        architecture = read_architecture(settings.policy.config)
        require_valid(settings, architecture, launch.world_size)
        return cls(settings, architecture, Layout.open(settings, launch))

    # -- work ----------------------------------------------------------------------------------------------------------

    def pack(self, sequences: Sequence[TokenSequence]) -> list[Pack]:
        """Balance sequences over all model replicas and micro-batches; returns this replica's packs.

        Every rank gives the same sequences and gets as many packs.
        """
        plan = self._plan([sequence.length for sequence in sequences])
        packs = build_packs(sequences, plan, alignment(self.settings))
        if self._levels:
            packs = level_packs(packs)
        return packs[self.layout.data_rank]

    def pack_lengths(self, lengths: Sequence[int], read: Callable[[Sequence[int]], Sequence[TokenSequence]]) -> list[Pack]:
        """The same packs where only the lengths are known everywhere: `read(positions)` fetches this replica's sequences.

        Every rank gives the same lengths. A dispatcher that wants level packs needs every replica's, so it reads all.
        """
        if self._levels:
            return self.pack(read(range(len(lengths))))
        own = self._plan(lengths)[self.layout.data_rank]
        positions = [position for pack in own for position in pack]
        found = dict(zip(positions, read(positions), strict=True))
        return [build_pack([found[position] for position in pack], alignment(self.settings)) for pack in own]

    @property
    def _levels(self) -> bool:
        return self.settings.moe.dispatcher == "allgather" and self.settings.layout.expert > 1

    def _plan(self, lengths: Sequence[int]) -> Plan:
        layout = self.settings.layout
        return plan_packs(
            lengths,
            data_parallel=self.layout.data_size,
            max_tokens=self.settings.batch.max_tokens,
            alignment=alignment(self.settings),
            cost=CostModel.of(self.architecture),
            multiple_of=layout.pipeline if layout.virtual_pipeline > 1 else 1,
        )

    def log_probs(
        self, packs: Sequence[Pack], *, entropy: bool = False, everywhere: bool = False, temperature: float | None = None
    ) -> list[TokenValues]:
        """Score the packs: float32 log-probs of the tokens that count (or of all, with `everywhere`), one entry a pack.

        At the policy's own temperature, unless another is given.

        Ranks that do not see the loss get an empty list. For unchanged weights and the same packs the values are bitwise
        those that `update` sees.
        """
        batches = self._batches(packs)
        wanted = [Wanted(b.labels, b.labels >= 0 if everywhere else b.mask, entropy) for b in batches]
        with torch.no_grad():
            outputs = self._run(batches, wanted, loss=None, temperature=temperature)
        return [TokenValues(output[0], output[1] if entropy else None) for output in outputs]

    def update(
        self, packs: Sequence[Pack], objective: Objective, columns: Mapping[str, Sequence[Tensor]] | None = None
    ) -> UpdateReport:
        """One optimizer step on the packs. `columns` adds per-token numbers by name, a tensor a pack as `log_probs` gives.

        A non-finite loss or gradient leaves the weights, moments and router biases as they were, and is counted.
        """
        batches = self._batches(packs)
        extra = self._by_pack(columns, len(packs))
        divisors = self._divisors(packs)
        self.optimizer.zero_grad()
        router_state = self.routers.snapshot()
        wanted = [Wanted(b.labels, b.mask, objective.needs_entropy) for b in batches]
        results = self._run(batches, wanted, loss=partial(self._loss, objective, divisors, extra))
        loss, metrics = reduce_results(results, self.layout)
        grad_norm = self.optimizer.gradient_norm()
        applied = not self.layout.agree(not (math.isfinite(loss) and math.isfinite(grad_norm)))
        if applied:
            self.optimizer.step(self.steps, grad_norm)
            self.steps += 1
        else:
            self.routers.restore(router_state)
            self.skipped += 1
        return UpdateReport(loss, grad_norm, metrics, applied, self.steps, self.skipped)

    def observe(
        self, packs: Sequence[Pack], objective: Objective, columns: Mapping[str, Sequence[Tensor]] | None = None
    ) -> list[TokenBatch]:
        """What `update` would show the objective now, without gradient. Empty on ranks that do not see the loss."""
        batches = self._batches(packs)
        extra = self._by_pack(columns, len(packs))
        divisors = self._divisors(packs)
        wanted = [Wanted(b.labels, b.mask, objective.needs_entropy) for b in batches]
        with torch.no_grad():
            outputs = self._run(batches, wanted, loss=None)
        return [
            self._token_batch(objective, divisors, more, batch, output)
            for more, batch, output in zip(extra, batches, outputs, strict=False)
        ]

    def per_sequence(self, packs: Sequence[Pack], values: Sequence[Tensor]) -> dict[int, NDArray[np.float32]]:
        """Whole token-aligned arrays by sequence index, on every rank of the replica: entry t belongs to token t.

        For looking at and storing; the training path leaves values where they are.
        """
        arrays: dict[int, NDArray[np.float32]] = {}
        for i, pack in enumerate(packs):
            flat = torch.zeros(pack.tokens, device=self.layout.device.torch_device)  # [tokens of the whole pack]
            if self.layout.sees_loss:
                flat[torch.from_numpy(local_indices(pack, self.layout)).to(flat.device)] = values[i].detach()
                flat = self.layout.sum_over_context(flat)
            whole = self.layout.from_last_stage(flat).cpu().numpy()
            start = 0
            for sequence, padded in zip(pack.sequences, pack.padded_lengths, strict=False):
                arrays[sequence.index] = np.concatenate([[0.0], whole[start : start + sequence.length - 1]]).astype(np.float32)
                start += padded
        return arrays

    @contextmanager
    def watching(self) -> Iterator[RoutingWatch]:
        """Inside, one pass without gradient (`log_probs` or `observe`) tells which experts the routers choose."""
        with watched(self.routers.routers()) as self._watch:
            try:
                yield self._watch
            finally:
                self._watch = None

    @contextmanager
    def replaying(
        self, routes: Sequence[Routes] | None = None, *, record: bool = False, obey: bool = True
    ) -> Iterator[RoutingReplay]:
        """Inside, passes over the same packs choose these experts, an entry a pack; `record` keeps what the last one chose.

        Without `routes` they choose by themselves, as without `obey`, where they are compared with `routes` and no more.
        Recomputed layers choose as the forward pass did.
        """
        with replaying(self.routers.routers(), self.layout.device, routes, record=record, obey=obey) as self._replay:
            try:
                yield self._replay
            finally:
                self._replay = None

    def rollout_routes(self, packs: Sequence[Pack]) -> list[Routes]:
        """This rank's part of the routing that the packs' sequences bring from the servers, an entry a pack."""
        layers = [int(router.layer_number) - 1 for router in self.routers.routers()]
        return [rollout_routes(pack, self.layout, self.architecture, layers) for pack in packs]

    def make_room(self) -> None:
        """Between steps, for servers on the same GPUs: give back what only learning needs, gradients and what lies unused."""
        with _no_word_of_storages():
            for chunk in self.model.chunks:
                chunk.offload_grad_buffers()

    def take_room(self) -> None:
        """Gradients have their memory again. Without it there is no `update`."""
        with _no_word_of_storages():
            for chunk in self.model.chunks:
                chunk.restore_grad_buffers()

    def close(self, *, leave: bool = True) -> None:
        """Leave the other ranks; call it on all of them. The model, and all that works on it, are gone afterwards.

        With `leave` off the ranks stay, for the next policy (`layout.together`).
        """
        self.layout.close(leave=leave)
        let_go(self.model)
        self.__dict__ = {name: self.__dict__[name] for name in ("settings", "architecture", "steps", "skipped")}
        gc.collect()  # each group has threads of its own, which a process that opens another policy would drag along

    # -- how -----------------------------------------------------------------------------------------------------------

    def _batches(self, packs: Sequence[Pack]) -> list[PackTensors]:
        sequences = [sequence for pack in packs for sequence in pack.sequences]
        everyone = self.layout.everyone_has(
            (len(packs), _common(s.columns for s in sequences), _common(s.scalars for s in sequences))
        )
        counts, columns, scalars = zip(*everyone, strict=True)
        multiple = self.settings.layout.pipeline if self.settings.layout.virtual_pipeline > 1 else 1
        if min(counts) != max(counts) or counts[0] == 0 or counts[0] % multiple:
            raise ValueError(
                f"ranks have {sorted(set(counts))} packs; every rank needs the same number, at least one and a multiple of "
                f"{multiple}. Make them with Policy.pack, which adds empty packs where needed."
            )
        # Names that all sequences of the step have: ranks with nothing but empty packs must know them too.
        names = [_common(given for given in every if given is not None) or () for every in (columns, scalars)]
        return [pack_tensors(pack, self.layout, *names) for pack in packs]

    def _run(self, batches: list[PackTensors], wanted: list[Wanted], loss: Any, temperature: float | None = None) -> list[Any]:
        """Drive Megatron's schedule over the micro-batches; forward alone when there is no loss."""
        head = self.head if temperature is None else replace(self.head, temperature=temperature)
        chunks = list(self.model.chunks)
        work = list(enumerate(zip(batches, wanted, strict=True)))
        longest = max(batch.tokens.size(1) for batch in batches)
        iterators: list[Iterator[Any]] = [iter(work) for _ in chunks]

        def forward_step(iterator: Iterator[Any], chunk: Any) -> tuple[Tensor, Any]:
            index, (batch, want) = next(iterator)
            real = self.layout.sequence_part(batch.real[0])  # [positions that routers see]
            if self._watch is not None:
                self._watch.see(real)
            with self._replay.forward(index, real) if self._replay else nullcontext():
                output = chunk(
                    batch.tokens,
                    batch.positions,
                    None,
                    packed_seq_params=batch.packed,
                    padding_mask=self._padding_mask(batch, chunk),
                    output_processor=head,
                    output_processor_context=want,
                )
            return output, (partial(loss, index, batch) if loss else lambda values, non_loss_data: values)

        if self._replay is not None:
            self._replay.begin(len(batches))
        schedule = get_forward_backward_func()
        results: list[Any] = schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=longest,  # a bound: packs announce their own size
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        return results

    def _padding_mask(self, batch: PackTensors, chunk: Any) -> Tensor | None:
        """True on padding, for routers that measure load. Only the first stage lets Megatron split it over tensor ranks."""
        if not self.routers.measure_load(self.settings.moe):
            return None
        mask = ~batch.real
        return mask if bare(chunk).pre_process else self.layout.sequence_part(mask, dim=1)

    def _loss(
        self,
        objective: Objective,
        divisors: Divisors,
        extra: list[dict[str, Tensor]],
        index: int,
        batch: PackTensors,
        output: Tensor,
    ) -> tuple[Tensor, Tensor, ObjectiveResult]:
        result = objective(self._token_batch(objective, divisors, extra[index], batch, output))
        # An empty pack still takes part in every collective of the backward pass.
        loss = result.loss + output.sum() * 0.0 if not batch.lengths.numel() else result.loss
        report = ObjectiveResult(result.loss.detach(), result.metrics)
        return loss, torch.zeros((), dtype=torch.int), report

    def _token_batch(
        self, objective: Objective, divisors: Divisors, extra: Mapping[str, Tensor], batch: PackTensors, output: Tensor
    ) -> TokenBatch:
        return TokenBatch(
            log_probs=output[0],
            mask=batch.mask,
            segments=batch.segments,
            lengths=batch.lengths,
            columns={**batch.columns, **extra},
            scalars=batch.scalars,
            divisors=divisors,
            sum_sequences=lambda values: batch.sum_sequences(values, self.layout.sum_over_context),
            entropy=output[1] if objective.needs_entropy else None,
        )

    def _by_pack(self, columns: Mapping[str, Sequence[Tensor]] | None, packs: int) -> list[dict[str, Tensor]]:
        """Further columns of each pack, where the loss is seen."""
        if not self.layout.sees_loss:
            return []
        return [{name: values[i] for name, values in (columns or {}).items()} for i in range(packs)]

    def _divisors(self, packs: Sequence[Pack]) -> Divisors:
        """Global totals of the step; also the divisor of the router's auxiliary losses, which are per real token."""
        sequences = [sequence for pack in packs for sequence in pack.sequences]
        counts = [
            sum(s.loss_tokens > 0 for s in sequences),
            sum(s.loss_tokens for s in sequences),
            sum(s.length for s in sequences),
        ]
        totals = self.layout.sum_over_data(torch.tensor(counts, device=self.layout.device.torch_device)).tolist()
        self.model.config.moe_grad_scale_func = lambda: torch.full((1,), 1.0 / max(totals[2], 1))  # [1], as Megatron's own
        return Divisors(sequences=totals[0], tokens=totals[1])


def _common(names: Iterable[Iterable[str]]) -> tuple[str, ...] | None:
    """The names that all have, or None when there is nobody."""
    given = [set(some) for some in names]
    return tuple(sorted(set.intersection(*given))) if given else None


@contextmanager
def _no_word_of_storages() -> Iterator[None]:
    """Megatron asks torch for storages in a way that torch warns of: nothing that a user could mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def _finalize_without_scaling(model: Any, num_tokens: Any, *, groups: Any, **kwargs: Any) -> None:
    """Reduce gradients over ranks as they are: the loss has been divided already."""
    kwargs["pg_collection"] = groups
    finalize_model_grads(model, None, **kwargs)

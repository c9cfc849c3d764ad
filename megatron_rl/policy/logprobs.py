"""Log-probabilities of labels: output layer, softmax and label lookup in one, parallel over the vocabulary.

With z = hidden @ weight^T / temperature over the whole vocabulary, of which this rank holds some columns,

    log p(label) = z_label - log sum_j exp z_j        H = -sum_j p_j log p_j
    d log p(label) / dz_j = [j = label] - p_j         dH / dz_j = -p_j (log p_j + H)

Logits live for one chunk of tokens at a time, in one buffer, and are computed again in the backward pass: [tokens, vocab]
never exists. Ranks exchange vectors over tokens once for all chunks: the maximum, then the sums relative to it.

Logits leave the matrix product in float32, whatever the weight's format. bfloat16 logits near 20 are 0.125 apart, which
moves a log-probability by far more than the 3e-4 at which GSPO clips.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements that element-wise passes and upcasts handle at a time: some 16 MiB stay near the processor, and as scratch are
# small beside a chunk's logits.
BLOCK_ELEMENTS = 2**22


def fused_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    chunk: int,
    vocab_start: int,
    vocab_valid: int,
    group: dist.ProcessGroup | None,
    with_entropy: bool,
    needed: Tensor | None = None,
    reduce_hidden_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each label under softmax(logits / temperature), and the entropy when asked: float32 [tokens] each.

    hidden [tokens, hidden] and labels [tokens] (ids of the whole vocabulary) are the same on all ranks of `group`; weight
    [rows, hidden] is this rank's part of the output layer, whose first `vocab_valid` rows belong to the ids from
    `vocab_start` on and whose rest is padding that is never read. `group` is None where the vocabulary is not cut.

    Positions that are not `needed` ([tokens] of bool) or whose label is no id of the vocabulary get 0 and no gradient;
    those not needed or with a negative label cost nothing either. `chunk` bounds the logits held: [chunk, vocab_valid].

    The gradient of `hidden` is summed over `group` unless `reduce_hidden_gradient` is off, for a caller whose own backward
    does that (the reduce-scatter of a sequence-parallel gather). The gradient of `weight` is accumulated in float32.
    """
    _check(hidden, weight, labels, temperature, chunk, vocab_valid, needed)
    wanted = labels >= 0 if needed is None else needed & (labels >= 0)
    rows = wanted.nonzero().squeeze(1)  # [rows]
    everything = len(rows) == len(labels)
    settings = _Settings(temperature, chunk, vocab_start, vocab_valid, group, with_entropy, reduce_hidden_gradient)
    chosen = hidden if everything else hidden.index_select(0, rows)  # [rows, hidden]
    log_probs, entropy = _FusedLogProbs.apply(chosen, weight, labels[rows], settings)
    if everything:
        return log_probs, entropy
    return _spread(log_probs, rows, len(labels)), None if entropy is None else _spread(entropy, rows, len(labels))


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk: int, vocab_valid: int, needed: Tensor | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype} must be matrices "
            "of one width and one dtype"
        )
    for name, tensor in {"labels": labels, "needed": needed}.items():
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} for {hidden.shape[0]} tokens")
    if not 0 <= vocab_valid <= weight.shape[0]:
        raise ValueError(f"vocab_valid={vocab_valid} of a weight with {weight.shape[0]} rows")
    if not temperature > 0 or chunk < 1:
        raise ValueError(f"temperature={temperature} and chunk={chunk} must be positive")


def _spread(values: Tensor, rows: Tensor, tokens: int) -> Tensor:
    return values.new_zeros(tokens).index_copy(0, rows, values)  # [tokens]


@dataclass(frozen=True)
class _Settings:
    temperature: float
    chunk: int
    vocab_start: int
    vocab_valid: int
    group: dist.ProcessGroup | None
    with_entropy: bool
    reduce_hidden_gradient: bool


class _FusedLogProbs(torch.autograd.Function):
    """The chunked computation over rows that all count."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, settings: _Settings) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        columns = labels - settings.vocab_start  # [rows]
        owned = (columns >= 0) & (columns < settings.vocab_valid)  # [rows]
        columns = columns.where(owned, 0)
        layer = _OutputLayer(weight, len(hidden), settings)
        maximum, sums = _local_statistics(layer, hidden, columns, owned, settings)
        _combine(maximum, sums, settings.group)

        partition, label_logit, owners, weighted = sums.unbind()  # [rows] each
        known = owners > 0  # [rows]: some rank owns the label
        log_partition = partition.log()
        log_probs = (label_logit - log_partition).where(known, 0.0)
        entropy = (log_partition - weighted / partition).where(known, 0.0) if settings.with_entropy else None
        ctx.save_for_backward(hidden, weight, columns, owned, known, maximum, partition, entropy)
        ctx.settings = settings
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, columns, owned, known, maximum, partition, entropy = ctx.saved_tensors
        settings: _Settings = ctx.settings
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        of_log_prob, of_entropy = (
            None if gradient is None else gradient.where(known, 0.0) / settings.temperature for gradient in gradients
        )
        if of_log_prob is None:
            of_log_prob = torch.zeros_like(maximum)
        # dz_j = exp(y_j) (constant + slope y_j) + [j = label] of_log_prob, with y = z - maximum and p = exp(y) / partition
        constant, slope = -of_log_prob / partition, None  # [rows]
        if of_entropy is not None:
            constant = -(of_log_prob + of_entropy * (entropy - partition.log())) / partition
            slope = -of_entropy / partition
        of_label = of_log_prob.where(owned, 0.0)

        layer = _OutputLayer(weight, len(hidden), settings)
        hidden_gradient = hidden.new_zeros(hidden.shape, dtype=layer.dtype) if need_hidden else None
        weight_gradient = weight.new_zeros(weight.shape, dtype=layer.dtype) if need_weight else None
        for part in layer.chunks:
            logits = layer.logits(hidden[part])  # [chunk, vocab/tp]
            for block in _slices(len(logits), layer.block):
                here = slice(part.start + block.start, part.start + block.stop)
                shifted = logits[block].sub_(maximum[here, None])
                if slope is None:
                    shifted.exp_().mul_(constant[here, None])
                else:
                    weights = layer.exp(shifted)
                    shifted.mul_(slope[here, None]).add_(constant[here, None]).mul_(weights)
                shifted.scatter_add_(1, columns[here, None], of_label[here, None])
            layer.add_gradients(
                logits, hidden[part], None if hidden_gradient is None else hidden_gradient[part], weight_gradient
            )

        if hidden_gradient is not None:
            if settings.reduce_hidden_gradient and settings.group is not None and len(hidden):
                dist.all_reduce(hidden_gradient, group=settings.group)
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype), None, None


def _local_statistics(
    layer: "_OutputLayer", hidden: Tensor, columns: Tensor, owned: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Over this rank's columns: the maximum m, and sum exp(z - m), the label's z - m, its owners, sum exp(z - m) (z - m)."""
    maximum = hidden.new_full((len(hidden),), torch.finfo(layer.dtype).min, dtype=layer.dtype)  # [rows]
    sums = hidden.new_zeros(4, len(hidden), dtype=layer.dtype)  # [4, rows]
    partition, label_logit, owners, weighted = sums.unbind()
    owners.copy_(owned)
    for part in layer.chunks:
        logits = layer.logits(hidden[part])  # [chunk, vocab/tp]
        for block in _slices(len(logits), layer.block):
            here = slice(part.start + block.start, part.start + block.stop)
            shifted = logits[block]
            maximum[here] = shifted.amax(1)
            shifted.sub_(maximum[here, None])
            label_logit[here] = shifted.gather(1, columns[here, None]).squeeze(1)
            if settings.with_entropy:
                weights = layer.exp(shifted)
                partition[here] = weights.sum(1)
                weighted[here] = shifted.mul_(weights).sum(1)
            else:
                partition[here] = shifted.exp_().sum(1)
    return maximum, sums


def _combine(maximum: Tensor, sums: Tensor, group: dist.ProcessGroup | None) -> None:
    """In place, from one rank's columns to the whole vocabulary's: the maximum, and the sums relative to it."""
    partition, label_logit, owners, weighted = sums.unbind()
    local = maximum.clone()
    if group is not None and len(maximum):
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    rise = local - maximum  # [rows]
    label_logit.copy_((label_logit + rise).where(owners > 0, 0.0))
    weighted.add_(partition * rise).mul_(rise.exp())
    partition.mul_(rise.exp())
    if group is not None and len(maximum):
        dist.all_reduce(sums, group=group)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + size, count))


class _OutputLayer:
    """Products of a chunk with the output weight, in float32 and in buffers that all chunks share.

    Tensor cores take 16-bit operands and hand out float32. Elsewhere 16-bit weights are widened, a tile of rows at a time.
    """

    def __init__(self, weight: Tensor, rows: int, settings: _Settings) -> None:
        columns, chunk = settings.vocab_valid, min(settings.chunk, rows)
        self.weight = weight[:columns]  # [vocab/tp, hidden]
        self.temperature = settings.temperature
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.chunks = list(_slices(rows, chunk)) if columns else []  # a rank may hold nothing but padding
        self.block = max(1, BLOCK_ELEMENTS // max(1, columns))
        self.buffer = weight.new_empty(chunk, columns, dtype=self.dtype)  # [chunk, vocab/tp]
        self.scratch: Tensor | None = None
        self.narrow = weight.dtype != self.dtype
        self.tensor_cores = self.narrow and weight.is_cuda

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ weight^T / temperature, in the buffer: [chunk, vocab/tp]."""
        logits = self.buffer[: len(hidden)]
        if self.tensor_cores:
            torch.mm(hidden, self.weight.t(), out_dtype=self.dtype, out=logits)
        else:
            wide = hidden.to(self.dtype)
            for rows, tile in self._tiles():
                torch.mm(wide, tile.t(), out=logits[:, rows])
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def exp(self, block: Tensor) -> Tensor:
        """exp(block), in the scratch buffer."""
        if self.scratch is None:
            self.scratch = self.buffer.new_empty(min(self.block, len(self.buffer)), self.buffer.shape[1])
        return torch.exp(block, out=self.scratch[: len(block)])

    def add_gradients(
        self, logit_gradient: Tensor, hidden: Tensor, hidden_gradient: Tensor | None, weight_gradient: Tensor | None
    ) -> None:
        """Add the gradient of a chunk's logits, [chunk, vocab/tp], times the weight and times the hidden states."""
        of_weight = None if weight_gradient is None else weight_gradient[: len(self.weight)]
        if self.tensor_cores:
            rounded = logit_gradient.to(self.weight.dtype)
            if hidden_gradient is not None:
                torch.mm(rounded, self.weight, out_dtype=self.dtype, out=hidden_gradient)
            if of_weight is not None:
                torch.addmm(of_weight, rounded.t(), hidden, out_dtype=self.dtype, out=of_weight)
            return
        if hidden_gradient is not None:
            for rows, tile in self._tiles():
                hidden_gradient.addmm_(logit_gradient[:, rows], tile)
        if of_weight is not None:
            of_weight.addmm_(logit_gradient.t(), hidden.to(self.dtype))

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in float32, [tile, hidden] at a time; whole where it is float32 already."""
        if not self.narrow:
            yield slice(0, len(self.weight)), self.weight
            return
        height = max(1, BLOCK_ELEMENTS // self.weight.shape[1])
        wide = self.weight.new_empty(min(height, len(self.weight)), self.weight.shape[1], dtype=self.dtype)
        for rows in _slices(len(self.weight), height):
            yield rows, wide[: rows.stop - rows.start].copy_(self.weight[rows])

"""The nouns that every room speaks."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sequence:
    """One prompt with its response, as token ids, ready to be learned from.

    Arrays are aligned with tokens: entry t belongs to token t. `loss_mask[t]` says that token t was produced by the policy
    and counts; `columns` holds further per-token numbers by name (the rollout's log-probs, say), `scalars` per-sequence
    numbers (an advantage). `index` is unique within the optimizer step and identifies the sequence on every rank; sequences
    that answer the same prompt share a `group`, which only objectives that compare them need.
    """

    index: int
    tokens: NDArray[np.int64]  # [length]
    loss_mask: NDArray[np.bool_]  # [length]
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # each [length]
    scalars: Mapping[str, float] = field(default_factory=dict)
    group: int | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) < 1:
            raise ValueError(f"sequence {self.index} has no tokens; a sequence needs at least its first prompt token")
        for name, array in {"loss_mask": self.loss_mask, **self.columns}.items():
            if len(array) != len(self.tokens):
                raise ValueError(f"sequence {self.index}: {name} has {len(array)} entries for {len(self.tokens)} tokens")
        if self.loss_mask[0]:
            raise ValueError(f"sequence {self.index}: the first token cannot be in the loss mask, nothing stands before it")

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def loss_tokens(self) -> int:
        """L_i: the number of tokens that count."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Pack:
    """One micro-batch: sequences laid end to end (THD), each padded at its end to its entry of `padded_lengths`.

    Entries beyond the sequences' are padding alone: a pack may hold no sequence at all, so that every data-parallel rank
    runs the same number of micro-batches. Padding never counts.
    """

    sequences: tuple[Sequence, ...]
    padded_lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return sum(self.padded_lengths)

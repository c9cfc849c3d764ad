"""The nouns that every room speaks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prompt:
    """A question: the tokens that a model continues, and what judging an answer needs.

    `key` names it for good: its source and row, so that a prompt drawn again in another epoch has the same key.
    """

    key: str
    tokens: NDArray[np.int64]  # [prompt], tokenised once
    messages: tuple[Mapping[str, str], ...] = ()  # the conversation it was made of, {"role", "content"}
    fields: Mapping[str, Any] = field(default_factory=dict)  # the columns that rewards and environments read
    max_new_tokens: int | None = None  # a limit of its own


@dataclass(frozen=True)
class Segment:
    """A run of tokens start … stop of a sample, by one author under one version of the weights.

    Every change of author or of weights begins a segment: a response that lives through an update has two.
    """

    start: int
    stop: int
    author: Literal["prompt", "policy", "environment"]
    version: int | None = None  # of the weights; None for tokens that no policy wrote
    turn: int = 0  # the policy's turns of an episode are counted from 0
    learned: bool = True  # whether a policy's tokens count in the loss (a draft's do not)


@dataclass(frozen=True)
class Sample:
    """One response, or one episode of several turns, as sampled: tokens in, tokens out, never tokenised again."""

    tokens: NDArray[np.int64]  # [length], the prompt first
    log_probs: NDArray[np.float32]  # [length] of the sampling distribution, as reported; 0 where no policy wrote
    segments: tuple[Segment, ...]  # they cover the tokens in order, without a gap
    finish: Literal["stop", "length", "abort", "budget", "error"]
    rewards: Mapping[str, float] = field(default_factory=dict)  # components by name, unweighted
    reward: float = 0.0  # what the advantage is made of
    failure: str | None = None  # why it has no honest reward: what went wrong, in words
    routing: NDArray[np.uint8] | NDArray[np.uint16] | None = None  # [length - 1, layers, top-k], experts of each position
    turn_rewards: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """[length] tokens that the policy wrote and that count."""
        mask = np.zeros(len(self.tokens), dtype=np.bool_)
        for segment in self.segments:
            mask[segment.start : segment.stop] = segment.author == "policy" and segment.learned
        return mask

    @property
    def prompt_length(self) -> int:
        return self.segments[0].stop if self.segments and self.segments[0].author == "prompt" else 0


@dataclass(frozen=True)
class Group:
    """A prompt with all samples that answer it: what advantages compare. Finished, rewarded, never changed again."""

    key: str  # unique in the bank: the prompt's key and the round it was drawn in
    prompt: Prompt
    samples: tuple[Sample, ...]
    step: int  # the training step it was sampled for
    information: Mapping[str, float] = field(default_factory=dict)  # tries, seconds and the like


@dataclass(frozen=True)
class Sequence:
    """One prompt with its response, as token ids, ready to be learned from.

    Arrays are aligned with tokens: entry t belongs to token t. `loss_mask[t]` says that token t was produced by the policy
    and counts; `columns` holds further per-token numbers by name (the rollout's log-probs, say), `scalars` per-sequence
    numbers (an advantage). `index` is unique within the optimizer step and identifies the sequence on every rank; sequences
    that answer the same prompt share a `group`, which only objectives that compare them need. `routing` is what the servers
    chose, where it shall be replayed; of the last token, which they were never fed, there is none.
    """

    index: int
    tokens: NDArray[np.int64]  # [length]
    loss_mask: NDArray[np.bool_]  # [length]
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # each [length]
    scalars: Mapping[str, float] = field(default_factory=dict)
    group: int | None = None
    routing: NDArray[np.uint8] | NDArray[np.uint16] | None = None  # [length - 1, layers, top-k]

    def __post_init__(self) -> None:
        if len(self.tokens) < 1:
            raise ValueError(f"sequence {self.index} has no tokens; a sequence needs at least its first prompt token")
        for name, array in {"loss_mask": self.loss_mask, **self.columns}.items():
            if len(array) != len(self.tokens):
                raise ValueError(f"sequence {self.index}: {name} has {len(array)} entries for {len(self.tokens)} tokens")
        if self.routing is not None and len(self.routing) != len(self.tokens) - 1:
            raise ValueError(
                f"sequence {self.index}: routing of {len(self.routing)} positions for {len(self.tokens)} tokens; it has all "
                "but the last"
            )
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

"""The proof after a publish: fixed token sequences, scored by the policy and by each server, must come out alike."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_rl.weights.publish.ports import Server

Scores = list[NDArray[np.float32]]  # of each sequence: [tokens] log-probs at temperature 1, 0 for the first token

# Mean |difference| of a sequence's log-probs that is rounding and no error, by the coarser format of the two sides. Seen on the
# CPU: 5e-6 in float32, 6e-2 at most in bfloat16.
TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 0.05, "fp8": 0.25}


def probe_sequences(vocabulary: int, count: int, tokens: int) -> list[list[int]]:
    """Random tokens, the same in every run. SGLang does not score the last of the vocabulary: it takes it for an image's."""
    drawn = np.random.default_rng(0).integers(0, vocabulary - 1, (count, tokens))
    return [[int(token) for token in row] for row in drawn]


async def server_scores(server: Server, sequences: Sequence[Sequence[int]]) -> Scores:
    """One after another: scores must not depend on what shares a batch with what."""
    return [await server.score(tokens) for tokens in sequences]


def difference(ours: Scores, theirs: Scores) -> float:
    """The mean |difference| of the sequence that differs most. Not-a-number counts as infinite."""
    means = [float(np.abs(a[1:] - b[1:]).mean()) for a, b in zip(ours, theirs, strict=True)]
    return max(mean if np.isfinite(mean) else float("inf") for mean in means)


def odd_one_out(checksums: Mapping[str, Sequence[Mapping[str, str]] | None]) -> str | None:
    """Servers cut alike must hold the same bytes: the first tensor that two of them hold differently, in words.

    `checksums` are those of each server, by its URL: one table for each tensor-parallel rank, None where it has none.
    """
    first: dict[tuple[int, ...], tuple[str, Sequence[Mapping[str, str]]]] = {}
    for url, tables in checksums.items():
        if tables is None:
            continue
        cut = (len(tables), *(len(table) for table in tables))
        other, expected = first.setdefault(cut, (url, tables))
        for rank, (theirs, ours) in enumerate(zip(expected, tables, strict=True)):
            for name, value in theirs.items():
                if ours.get(name) != value:
                    return f"{name} (tensor-parallel rank {rank}) is not the same on {other} and {url}"
    return None

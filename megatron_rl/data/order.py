"""Which row comes when: pure functions of seed, epoch and position, so that nothing but a position is ever saved.

Every process computes the same order by itself. Nothing here depends on how many processes there are, nor on the version of a
random generator: rows are put in the order of their 64-bit hashes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm

import numpy as np
from numpy.typing import NDArray

from megatron_rl.config.errors import DataError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # constants of splitmix64 (Steele, Lea, Flood 2014)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
LONGEST_PERIOD = 1 << 24


def hashes(rows: int, *names: object) -> NDArray[np.uint64]:
    """[rows] a number for each row: splitmix64, begun at a hash of the names."""
    start = np.frombuffer(hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest(), "<u8").astype(np.uint64)
    values = start + GOLDEN * np.arange(1, rows + 1, dtype=np.uint64)
    values = (values ^ (values >> np.uint64(30))) * FIRST
    values = (values ^ (values >> np.uint64(27))) * SECOND
    return values ^ (values >> np.uint64(31))


def epoch_order(rows: int, source: str, seed: int, epoch: int) -> NDArray[np.int64]:
    """[rows] the rows of a source in the order of an epoch. Another source beside it changes nothing."""
    return np.argsort(hashes(rows, "order", source, seed, epoch), kind="stable")


def held_out(rows: int, source: str, share: float) -> NDArray[np.bool_]:
    """[rows] is a row set aside for validation? The same rows whatever the seed; a larger share holds those of a smaller."""
    mask = np.zeros(rows, dtype=np.bool_)
    mask[np.argsort(hashes(rows, "validation", source), kind="stable")[: round(rows * share)]] = True
    return mask


@dataclass(frozen=True)
class Interleave:
    """Sources by weight: in every period each comes exactly as often as its weight says, evenly spread."""

    weights: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[float | int]) -> "Interleave":
        """Weights as written, 0.7 as 7/10."""
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(weight * lcm(*(other.denominator for other in exact))) for weight in exact]
        shortest = tuple(weight // gcd(*whole) for weight in whole)
        if len(shortest) > 1 and sum(shortest) > LONGEST_PERIOD:
            raise DataError(
                f"data.sources: weights {', '.join(map(str, weights))} have no common measure: it would take {sum(shortest):,} "
                "prompts until all have come as often as they should. Set weights with fewer digits (the default is the number "
                "of rows)."
            )
        return cls(shortest)

    @property
    def period(self) -> int:
        return sum(self.weights)

    def at(self, position: int) -> tuple[int, int]:
        """The source whose turn it is, and how often it has had its turn before."""
        if len(self.weights) == 1:
            return 0, position
        turn, place = divmod(position, self.period)
        sources, occurrences = self._schedule
        source = int(sources[place])
        return source, turn * self.weights[source] + int(occurrences[place])

    @cached_property
    def _schedule(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[period] sources and their occurrences: the j-th of w turns of a source stands at (j + 1/2) / w of the period."""
        sources = np.repeat(np.arange(len(self.weights)), self.weights)
        occurrences = np.concatenate([np.arange(weight) for weight in self.weights])
        order = np.lexsort((sources, (2 * occurrences + 1) / (2 * np.repeat(self.weights, self.weights))))
        return sources[order], occurrences[order]

"""What was scored: tokens that a server sampled, by what both sides say of them. Numbers alone, no model and no server."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # last positions of a bin, first is 1
PROBABILITIES = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0)  # upper ends of bins


@dataclass(frozen=True)
class Drawn:
    """One response of a server to a prompt."""

    tokens: NDArray[np.int64]  # [length], the prompt first
    prompt: int  # tokens of it
    reported: NDArray[np.float32]  # [length - prompt] log-probs as told while it sampled, at the sampling temperature
    given: NDArray[np.float32]  # [length] log-probs of the same tokens handed to it whole, at temperature 1; 0 for the first
    routing: NDArray[Any] | None = None  # [length - 1, layers, top-k], where the server returns it

    @property
    def response(self) -> slice:
        return slice(self.prompt, len(self.tokens))


@dataclass(frozen=True)
class Compared:
    """All sampled tokens, one row each: what two sides say of it."""

    difference: Floats  # [tokens] log-prob of ours − theirs
    theirs: Floats  # [tokens] log-prob by the server
    position: NDArray[np.int64]  # [tokens] in its sequence: tokens before it
    agree: NDArray[np.bool_] | None = None  # [tokens, layers] whether both sides chose the same experts where it was predicted

    @classmethod
    def of(
        cls,
        drawn: Sequence[Drawn],
        ours: Sequence[NDArray[np.float32]],
        routes: Sequence[NDArray[Any]] | None = None,
        *,
        layers: Sequence[int] = (),
        given: bool = False,
    ) -> "Compared":
        """`ours` are log-probs by the policy, [length] each; `routes` its experts, [length, layers with experts, top-k], and
        `layers` which those are. `given`: against what the server says of tokens handed to it, rather than while sampling."""
        differences, theirs, positions, agreements = [], [], [], []
        for number, (each, own) in enumerate(zip(drawn, ours, strict=True)):
            told = (each.given[each.response] if given else each.reported).astype(np.float64)
            differences.append(own[each.response].astype(np.float64) - told)
            theirs.append(told)
            positions.append(np.arange(each.prompt, len(each.tokens)))
            if routes is not None and each.routing is not None:
                before = slice(each.prompt - 1, len(each.tokens) - 1)  # the position that predicts a token is the one before it
                agreements.append(same_experts(routes[number][before], each.routing[before][:, list(layers)]))
        agree = np.concatenate(agreements) if agreements and len(agreements) == len(differences) else None
        return cls(np.concatenate(differences), np.concatenate(theirs), np.concatenate(positions), agree)

    @property
    def size(self) -> Floats:
        """[tokens] |Δ|; what is not a number counts as infinite."""
        return np.where(np.isfinite(self.difference), np.abs(self.difference), np.inf)

    @property
    def mean(self) -> float:
        return float(self.size.mean())

    @property
    def largest(self) -> float:
        return float(self.size.max())

    @property
    def kl(self) -> float:
        """KL(server ‖ policy) by k3 = e^x − 1 − x, which is never negative."""
        return float((np.expm1(self.difference) - self.difference).mean())

    def summary(self) -> dict[str, float]:
        half, high = np.quantile(self.size, [0.5, 0.99])
        return {
            "tokens": float(len(self.difference)),
            "mean": self.mean,
            "median": float(half),
            "p99": float(high),
            "max": self.largest,
            "signed_mean": float(self.difference.mean()),
            "kl": self.kl,
        }


@dataclass(frozen=True)
class Bin:
    """|Δ| of some of the tokens."""

    name: str
    tokens: int
    mean: float
    median: float
    p99: float
    max: float


def same_experts(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
    """[tokens, layers] whether two choices [tokens, layers, top-k] name the same experts, in whatever order."""
    return np.asarray((np.sort(ours, -1) == np.sort(theirs, -1)).all(-1))


def by_position(compared: Compared) -> list[Bin]:
    ends = np.array(POSITIONS)
    number = np.searchsorted(ends, compared.position)
    names = [
        "1",
        *(f"{low + 1}-{high}" if high > low + 1 else f"{high}" for low, high in pairwise(ends)),
    ]
    names.append(f"beyond {ends[-1]}")
    return [found for k, name in enumerate(names) if (found := _bin(name, compared.size[number == k])) is not None]


def by_probability(compared: Compared) -> list[Bin]:
    ends = np.array(PROBABILITIES)
    number = np.searchsorted(ends, np.exp(np.minimum(compared.theirs, 0.0)))
    names = [f"≤ {end:g}" for end in PROBABILITIES]
    return [found for k, name in enumerate(names) if (found := _bin(name, compared.size[number == k])) is not None]


def by_routing(compared: Compared, layers: Sequence[int]) -> list[dict[str, float]]:
    """For each layer: the share of tokens with other experts, and mean |Δ| of those with the same and with others."""
    if compared.agree is None:
        return []
    found = []
    for layer, same in zip(layers, compared.agree.T, strict=True):
        row = {"layer": float(layer), "differs": float((~same).mean())}
        row |= {name: float(compared.size[rows].mean()) for name, rows in (("same", same), ("other", ~same)) if rows.any()}
        found.append(row)
    return found


def growth(compared: Compared) -> float:
    """Rank correlation of |Δ| with the position: near 1 where it grows along the sequence."""
    if len(compared.size) < 2 or np.ptp(compared.position) == 0 or np.ptp(compared.size) == 0:
        return 0.0
    ranks = [values.argsort().argsort().astype(np.float64) for values in (compared.position, compared.size)]
    ours, theirs = (values - values.mean() for values in ranks)
    return float((ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum()))


def _bin(name: str, size: Floats) -> Bin | None:
    if not len(size):
        return None
    half, high = np.quantile(size, [0.5, 0.99])
    return Bin(name, len(size), float(size.mean()), float(half), float(high), float(size.max()))

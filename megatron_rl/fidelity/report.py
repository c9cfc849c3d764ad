"""What was found: stages of the search, causes, and the verdict in words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_rl.fidelity.tokens import Compared, by_position, by_probability, by_routing
from megatron_rl.weights.publish.probe import TOLERANCE

type CauseName = Literal[
    "temperature", "config", "precision", "stale weights", "wrong tensors", "routing", "kernels", "weights or kernels"
]

OUTLIERS = 100.0  # times the tolerated mean that a single token may be off by
FINENESS = ("float32", "bfloat16", "fp8")  # formats of a policy, from fine to coarse


@dataclass(frozen=True)
class Tolerance:
    """What is rounding and no error: mean |Δ| over all tokens, and |Δ| of any one."""

    mean: float
    largest: float
    reason: str

    @classmethod
    def of(cls, ours: str, theirs: str, given: float | None) -> "Tolerance":
        """By the finer of both formats: that one side is coarser is a cause, and not an excuse. float16 counts as bfloat16."""
        if given is not None:
            return cls(given, OUTLIERS * given, "as asked")
        finer = min((name if name in FINENESS else "bfloat16" for name in (ours, theirs)), key=FINENESS.index)
        return cls(TOLERANCE[finer], OUTLIERS * TOLERANCE[finer], f"rounding in {finer}")

    def holds(self, compared: Compared) -> bool:
        return compared.mean <= self.mean and compared.largest <= self.largest


@dataclass(frozen=True)
class Stage:
    """The tokens compared with one more thing made equal."""

    name: str
    text: str
    compared: Compared
    tolerance: Tolerance

    @property
    def within(self) -> bool:
        return self.tolerance.holds(self.compared)

    def as_json(self) -> dict[str, Any]:
        numbers = {**self.compared.summary(), "tolerance": self.tolerance.mean, "tolerance_max": self.tolerance.largest}
        return {"name": self.name, "text": self.text, **numbers, "within": self.within}


@dataclass(frozen=True)
class Cause:
    name: CauseName
    text: str
    before: float  # mean |Δ| with it
    after: float  # and without


@dataclass(frozen=True)
class Report:
    """All that `megatron-rl mismatch` says."""

    policy: Mapping[str, Any]
    server: Mapping[str, Any]
    stages: Sequence[Stage]  # the first is how things are
    aside: Sequence[Stage]  # comparisons that are no step of the search
    causes: Sequence[Cause]
    layers: Sequence[int]  # with experts
    notes: Sequence[str] = ()
    quantized: Mapping[str, Any] = field(default_factory=dict)  # the audit of FP8 layers
    problems: Sequence[str] = ()  # that it found
    differing: Sequence[str] = ()  # tensors that were not the checkpoint's

    @property
    def within(self) -> bool:
        return self.stages[0].within and not self.problems

    @property
    def cause(self) -> CauseName | None:
        """What took most of the difference away."""
        return max(self.causes, key=lambda cause: cause.before - cause.after).name if self.causes else None

    @property
    def verdict(self) -> str:
        first = self.stages[0]
        size = f"mean |Δlogp| {number(first.compared.mean)}, largest {number(first.compared.largest)}"
        allowed = (
            f"({number(first.tolerance.mean)} and {number(first.tolerance.largest)} are allowed: {first.tolerance.reason})"
        )
        if first.within:
            said = f"Policy and server agree: {size} {allowed}."
        else:
            said = f"Policy and server differ: {size} {allowed}. " + " ".join(f"{cause.text}" for cause in self.causes)
        return " ".join([said, *(f"FP8 layers differ: {problem}" for problem in self.problems)])

    def as_json(self) -> dict[str, Any]:
        shown = self.stages[0].compared
        return {
            "within": self.within,
            "cause": self.cause,
            "verdict": self.verdict,
            "causes": [asdict(cause) for cause in self.causes],
            "stages": [stage.as_json() for stage in self.stages],
            "aside": [stage.as_json() for stage in self.aside],
            "by_position": [asdict(each) for each in by_position(shown)],
            "by_probability": [asdict(each) for each in by_probability(shown)],
            "by_routing": by_routing(shown, self.layers),
            "differing": list(self.differing),
            "fp8": {"sides": dict(self.quantized), "problems": list(self.problems)},
            "policy": dict(self.policy),
            "server": dict(self.server),
            "notes": list(self.notes),
        }


def number(value: float) -> str:
    return f"{value:.2g}" if value < 1000 else f"{value:.0f}"

"""For every surrogate of the registry: the options it is tested with, and the reference that says what it must give."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.objectives import reference as plain
from tests.objectives import reference_rules as rules
from tests.objectives.reference import Answer, Sample, mean, one_value, value_a_token

BY_TOKEN: Mapping[str, Any] = {"aggregation": "token_mean"}


@dataclass(frozen=True)
class Case:
    """A surrogate with options, and its loss by the reference.

    `clips`: it reports a clip set. `true_gradient`: it stops no gradient, so that its gradient is its value's.
    """

    surrogate: str
    reference: Callable[[Sequence[Sample]], Answer]
    options: Mapping[str, Any] = field(default_factory=dict)
    clips: bool = False
    true_gradient: bool = True

    def __str__(self) -> str:
        return "-".join([self.surrogate, *(f"{name}={value}" for name, value in self.options.items())])


def dr_grpo(samples: Sequence[Sample], constant: float) -> Answer:
    """The constant of Dr.GRPO stands for a response's length."""
    counted = sum(sample.length > 0 for sample in samples)
    return value_a_token(samples, plain.grpo, constant=constant * max(counted, 1))


def gmpo(samples: Sequence[Sample], **options: Any) -> Answer:
    answer = one_value(samples, plain.gmpo, **options)
    answer.clipped = [plain.gmpo_clipped(sample, **options) for sample in samples]
    return answer


def gtpo_code(samples: Sequence[Sample]) -> Answer:
    """The authors' code: over its conflict tokens, summed over completions."""
    counted = sum(sample.length > 0 for sample in samples)
    by_conflicts = [[counted / max(sum(c != 1 for c in s.conflict), 1)] * s.length for s in samples]
    return value_a_token(samples, plain.gtpo, by_conflicts, drops=lambda sample: mean(sample.entropy) > 0.7)


def of_ratio(name: str, surrogate: Callable[..., Any], whole: bool, **options: Any) -> Case:
    return Case(name, partial(one_value if whole else value_a_token, surrogate=surrogate, **options), options, clips=True)


ABC_BOUNDS: Mapping[str, Any] = {"epsilon_1": 0.3, "epsilon_2": 0.1, "epsilon_3": 0.25, "epsilon_4": 0.15}
WIDE: Mapping[str, Any] = {"clip_low": 0.05, "clip_high": 0.1}
NARROW: Mapping[str, Any] = {"clip_low": 0.1, "clip_high": 0.2}
STEEP: Mapping[str, Any] = {"tau_positive": 2.0, "tau_negative": 3.0}
CODE: Mapping[str, Any] = {"filter": "code", "divide_by_conflicts": True}

CASES = [
    of_ratio("gspo", plain.gspo, True),
    of_ratio("gspo", plain.gspo, True, **WIDE),
    Case("gspo_token", partial(value_a_token, surrogate=plain.gspo_token), clips=True, true_gradient=False),
    Case("gspo_token", partial(value_a_token, surrogate=plain.gspo_token, **WIDE), WIDE, clips=True, true_gradient=False),
    of_ratio("luspo", plain.luspo, True),
    of_ratio("luspo", plain.luspo, True, **WIDE),
    of_ratio("grpo", plain.grpo, False),
    of_ratio("grpo", plain.grpo, False, clip_low=0.1, clip_high=0.3, dual_clip=1.2),
    Case("grpo", partial(value_a_token, surrogate=plain.grpo, divide_by_tokens=True), BY_TOKEN, clips=True),
    Case("grpo", partial(dr_grpo, constant=7.0), {"aggregation": "constant", "constant": 7.0}, clips=True),
    Case("dapo", partial(value_a_token, surrogate=plain.grpo, clip_high=0.28, divide_by_tokens=True), clips=True),
    of_ratio("abc", plain.abc, False),
    of_ratio("abc", plain.abc, False, **ABC_BOUNDS),
    Case("dhpo", partial(value_a_token, surrogate=plain.dhpo, alpha=lambda *_: 0.5), clips=True, true_gradient=False),
    Case(
        "dhpo",
        partial(value_a_token, surrogate=plain.dhpo, alpha=plain.entropy_share),
        {"mixing": "entropy"},
        clips=True,
        true_gradient=False,
    ),
    Case(
        "cispo",
        partial(value_a_token, surrogate=plain.cispo, clip_low=1.0, clip_high=0.28, divide_by_tokens=True),
        clips=True,
        true_gradient=False,
    ),
    Case(
        "cispo",
        partial(value_a_token, surrogate=plain.cispo, divide_by_tokens=True, **NARROW),
        NARROW,
        clips=True,
        true_gradient=False,
    ),
    Case("sapo", partial(value_a_token, surrogate=plain.sapo)),
    Case("sapo", partial(value_a_token, surrogate=plain.sapo, **STEEP), STEEP),
    Case("gmpo", gmpo, clips=True),
    Case("gmpo", partial(gmpo, **NARROW), NARROW, clips=True),
    Case("sspo", partial(one_value, surrogate=plain.sspo, gate=plain.sigmoid_gate)),
    Case("sspo", partial(one_value, surrogate=plain.sspo, gate=plain.arctan_gate), {"gate": "arctan"}),
    Case("cfpo", partial(value_a_token, surrogate=plain.cfpo_token, epsilon=0.2)),
    Case("cfpo", partial(one_value, surrogate=plain.cfpo_sequence, epsilon=0.01), {"ratio": "sequence", "epsilon": 0.01}),
    Case("gtpo", partial(value_a_token, surrogate=plain.gtpo, drops=plain.gtpo_drops_by_paper), true_gradient=False),
    Case("gtpo", gtpo_code, CODE, true_gradient=False),
    Case("trpa", rules.trpa),
    Case("rebel", rules.rebel),
    Case("rebel", partial(rules.rebel, eta=0.5), {"eta": 0.5}),
    Case("agro", partial(rules.agro, beta=0.01)),
    Case("agro", partial(rules.agro, beta=0.4), {"beta": 0.4}),
    Case("sft", partial(value_a_token, surrogate=plain.supervised, divide_by_tokens=True)),
    Case("sft", partial(value_a_token, surrogate=plain.supervised), {"aggregation": "sequence_mean"}),
]

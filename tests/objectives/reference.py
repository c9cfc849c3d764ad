"""Every surrogate of the literature as loops over plain floats, with its gradient derived by hand.

Written from the papers' formulas alone: it shares no code with the package, knows no packing, no masks and no tensors. A sample
holds the tokens that count and nothing else. `test_reference.py` checks the hand-made gradients by central differences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import atan, exp, log
from typing import Any


@dataclass
class Sample:
    """One response: numbers for each token that counts, and numbers of the response."""

    new: list[float]
    old: list[float]
    reference: list[float]
    rollout: list[float]
    entropy: list[float]
    conflict: list[float]  # GTPO's λ
    token_advantage: list[float]  # for GSPO-token
    advantage: float = 0.0
    reward: float = 0.0
    group: int = 0
    initial_entropy: float = 0.0

    @property
    def length(self) -> int:
        return len(self.new)

    @property
    def differences(self) -> list[float]:
        return [new - old for new, old in zip(self.new, self.old, strict=True)]


@dataclass
class Term:
    """Something to maximise: its value, its derivative by each token of its sample, and whether a clip stopped it."""

    value: float
    gradient: list[float]
    clipped: bool = False


@dataclass
class Answer:
    """The loss of a step, its gradient by every token, and which tokens (or whole responses) are clipped."""

    loss: float
    gradient: list[list[float]]
    clipped: list[list[bool]] = field(default_factory=list)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def pessimistic(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float, bool]:
    """min(ratio·A, clip(ratio)·A): value, derivative by the ratio, clipped. A ratio on the boundary is inside."""
    if advantage > 0 and ratio > 1 + high:
        return (1 + high) * advantage, 0.0, True
    if advantage < 0 and ratio < 1 - low:
        return (1 - low) * advantage, 0.0, True
    return ratio * advantage, advantage, False


def alone(length: int, token: int, derivative: float) -> list[float]:
    """A gradient that one token has to itself."""
    return [derivative if t == token else 0.0 for t in range(length)]


# -- one ratio a response ------------------------------------------------------------------------------------------------


def sequence_ratio(sample: Sample) -> float:
    return exp(mean(sample.differences))


def gspo(sample: Sample, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Term:
    ratio = sequence_ratio(sample)
    value, slope, clipped = pessimistic(ratio, sample.advantage, clip_low, clip_high)
    return Term(value, [slope * ratio / sample.length] * sample.length, clipped)


def luspo(sample: Sample, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Term:
    term = gspo(sample, clip_low, clip_high)
    return Term(term.value * sample.length, [g * sample.length for g in term.gradient], term.clipped)


def gmpo(sample: Sample, clip_low: float = 0.4, clip_high: float = 0.4) -> Term:
    """The geometric mean of ratios, each held back on the side that its advantage would push it to."""
    a, kept, free = sample.advantage, [], []
    for d in sample.differences:
        beyond = (a > 0 and d > clip_high) or (a < 0 and d < -clip_low)
        kept.append((clip_high if a > 0 else -clip_low) if beyond else d)
        free.append(not beyond)
    ratio = exp(mean(kept))
    return Term(ratio * a, [ratio * a / sample.length if is_free else 0.0 for is_free in free])


def gmpo_clipped(sample: Sample, clip_low: float = 0.4, clip_high: float = 0.4) -> list[bool]:
    a = sample.advantage
    return [(a > 0 and d > clip_high) or (a < 0 and d < -clip_low) for d in sample.differences]


def cfpo_curve(ratio: float, advantage: float, epsilon: float) -> tuple[float, float]:
    """rA − |A|/(2ε)·(r−1)² and its derivative by r."""
    pull = abs(advantage) / (2 * epsilon)
    return ratio * advantage - pull * (ratio - 1) ** 2, advantage - 2 * pull * (ratio - 1)


def cfpo_sequence(sample: Sample, epsilon: float) -> Term:
    ratio = sequence_ratio(sample)
    value, slope = cfpo_curve(ratio, sample.advantage, epsilon)
    return Term(value, [slope * ratio / sample.length] * sample.length)


def sspo(sample: Sample, gate: Callable[..., tuple[float, float]], **options: float) -> Term:
    """exp(mean log g(w))·A; `gate` gives log g and its derivative by the log-ratio."""
    pairs = [gate(sample, d, **options) for d in sample.differences]
    factor = exp(mean([log_gate for log_gate, _ in pairs]))
    return Term(factor * sample.advantage, [factor * sample.advantage * slope / sample.length for _, slope in pairs])


# -- one ratio a token ---------------------------------------------------------------------------------------------------


def per_token(sample: Sample, curve: Callable[[float, float], tuple[float, float, bool]]) -> list[Term]:
    """Terms of each token from (log-ratio, advantage) -> (value, derivative by the log-ratio, clipped)."""
    terms = []
    for t, d in enumerate(sample.differences):
        value, slope, clipped = curve(d, sample.advantage)
        terms.append(Term(value, alone(sample.length, t, slope), clipped))
    return terms


def grpo(sample: Sample, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> list[Term]:
    def curve(d: float, a: float) -> tuple[float, float, bool]:
        ratio = exp(d)
        value, slope, clipped = pessimistic(ratio, a, clip_low, clip_high)
        if dual_clip is not None and a < 0 and ratio > dual_clip:
            return dual_clip * a, 0.0, True
        return value, slope * ratio, clipped

    return per_token(sample, curve)


def gspo_token(sample: Sample, clip_low: float = 3e-4, clip_high: float = 4e-4) -> list[Term]:
    """s_it = sg[s_i]·exp(new_it − sg[new_it]): the sequence's ratio in value, the token's own in gradient."""
    ratio, terms = sequence_ratio(sample), []
    for t, a in enumerate(sample.token_advantage):
        value, slope, clipped = pessimistic(ratio, a, clip_low, clip_high)
        terms.append(Term(value, alone(sample.length, t, slope * ratio), clipped))
    return terms


def cispo(sample: Sample, clip_low: float, clip_high: float) -> list[Term]:
    """sg[clip(w)]·A·new: the clip bounds the weight of a token's gradient and never stops it."""
    terms = []
    for t, (d, new) in enumerate(zip(sample.differences, sample.new, strict=True)):
        weight = clip(exp(d), 1 - clip_low, 1 + clip_high) * sample.advantage
        outside = exp(d) > 1 + clip_high or exp(d) < 1 - clip_low
        terms.append(Term(weight * new, alone(sample.length, t, weight), outside))
    return terms


def sapo(sample: Sample, tau_positive: float = 1.0, tau_negative: float = 1.05) -> list[Term]:
    def curve(d: float, a: float) -> tuple[float, float, bool]:
        ratio, tau = exp(d), tau_positive if a > 0 else tau_negative
        gate = sigmoid(tau * (ratio - 1))
        return 4 / tau * gate * a, 4 * gate * (1 - gate) * a * ratio, False

    return per_token(sample, curve)


def abc(
    sample: Sample, epsilon_1: float = 0.2, epsilon_2: float = 0.2, epsilon_3: float = 0.2, epsilon_4: float = 0.2
) -> list[Term]:
    def curve(d: float, a: float) -> tuple[float, float, bool]:
        ratio = exp(d)
        low, high = (1 - epsilon_2, 1 + epsilon_1) if a > 0 else (1 - epsilon_4, 1 + epsilon_3)
        outside = ratio < low or ratio > high
        return clip(ratio, low, high) * a, 0.0 if outside else ratio * a, outside and a != 0

    return per_token(sample, curve)


def cfpo_token(sample: Sample, epsilon: float) -> list[Term]:
    def curve(d: float, a: float) -> tuple[float, float, bool]:
        value, slope = cfpo_curve(exp(d), a, epsilon)
        return value, slope * exp(d), False

    return per_token(sample, curve)


def supervised(sample: Sample) -> list[Term]:
    return [Term(new, alone(sample.length, t, 1.0)) for t, new in enumerate(sample.new)]


def gtpo(sample: Sample, gamma: float = 0.1, drops: Callable[[Sample], bool] = lambda _: False) -> list[Term]:
    """δ(A − γ⟨H⟩) w λ, w = 1 in value and the carrier of the gradient."""
    factor = 0.0 if drops(sample) else sample.advantage - gamma * mean(sample.entropy)
    return [Term(factor * c, alone(sample.length, t, factor * c)) for t, c in enumerate(sample.conflict)]


def gtpo_drops_by_paper(sample: Sample) -> bool:
    """A response grown uncertain, of a policy that began certain."""
    return sample.initial_entropy < log(2) < mean(sample.entropy)


def dhpo(sample: Sample, alpha: Callable[[Sample, int], float]) -> list[Term]:
    """α of GRPO's term with ε 0.2/0.28 and 1 − α of GSPO-token's, each clipped by itself."""
    own, shared = grpo(sample, 0.2, 0.28), gspo_token(sample)
    terms = []
    for t in range(sample.length):
        share = alpha(sample, t)
        mixed = blend([own[t], shared[t]], [share, 1 - share], sample.length)
        terms.append(Term(mixed.value, mixed.gradient, own[t].clipped))
    return terms


def entropy_share(sample: Sample, token: int) -> float:
    """H_t / 2⟨H⟩, a share."""
    centre = mean(sample.entropy)
    return clip(sample.entropy[token] / (2 * centre), 0.0, 1.0) if centre > 0 else 0.5


def sigmoid_gate(sample: Sample, d: float, tau_positive: float = 1.0, tau_negative: float = 1.05) -> tuple[float, float]:
    """log of (4/τ)σ(τ(w−1)), and its slope by log w."""
    tau = tau_positive if sample.advantage > 0 else tau_negative
    gate = sigmoid(tau * (exp(d) - 1))
    return log(4 / tau * gate), tau * exp(d) * (1 - gate)


def arctan_gate(sample: Sample, d: float, tau_positive: float = 1.0, tau_negative: float = 1.05) -> tuple[float, float]:
    """arctan(τ log w)/τ, and its slope by log w."""
    tau = tau_positive if sample.advantage > 0 else tau_negative
    return atan(tau * d) / tau, 1 / (1 + (tau * d) ** 2)


# -- from terms to a step ------------------------------------------------------------------------------------------------


def blend(terms: Sequence[Term], factors: Sequence[float], length: int) -> Term:
    """Σ factor·term."""
    value = sum(factor * term.value for term, factor in zip(terms, factors, strict=True))
    gradient = [sum(factor * term.gradient[t] for term, factor in zip(terms, factors, strict=True)) for t in range(length)]
    return Term(value, gradient)


def one_value(
    samples: Sequence[Sample], surrogate: Callable[..., Term], weights: Sequence[float] | None = None, **options: Any
) -> Answer:
    """Surrogates with one value a response: −(1/N) Σ_i u_i f_i."""
    counted = sum(sample.length > 0 for sample in samples)
    answer = Answer(0.0, [], [])
    for i, sample in enumerate(samples):
        term = surrogate(sample, **options) if sample.length else Term(0.0, [])
        factor = (1.0 if weights is None else weights[i]) / max(counted, 1)
        answer.loss -= factor * term.value
        answer.gradient.append([-factor * g for g in term.gradient])
        answer.clipped.append([term.clipped] * sample.length)
    return answer


def value_a_token(
    samples: Sequence[Sample],
    surrogate: Callable[..., list[Term]],
    weights: Sequence[Sequence[float]] | None = None,
    divide_by_tokens: bool = False,
    constant: float | None = None,
    **options: Any,
) -> Answer:
    """Surrogates with one value a token: −(1/N) Σ_i (1/L_i) Σ_t u_it f_it, −(1/T) Σ_i Σ_t u_it f_it, or a constant for T."""
    counted, tokens = sum(sample.length > 0 for sample in samples), sum(sample.length for sample in samples)
    answer = Answer(0.0, [], [])
    for i, sample in enumerate(samples):
        terms = surrogate(sample, **options)
        divisor = float(tokens) if divide_by_tokens else float(counted * sample.length)
        divisor = constant if constant is not None else divisor
        factors = [(1.0 if weights is None else weights[i][t]) / divisor for t in range(sample.length)]
        total = blend(terms, factors, sample.length)
        answer.loss -= total.value
        answer.gradient.append([-g for g in total.gradient])
        answer.clipped.append([term.clipped for term in terms])
    return answer


def sum_answers(parts: Sequence[Answer], factors: Sequence[float]) -> Answer:
    """Σ factor·answer; the clip sets are the first one's."""
    loss = sum(factor * part.loss for part, factor in zip(parts, factors, strict=True))
    gradient = [
        [sum(factor * g for factor, g in zip(factors, by_part, strict=True)) for by_part in zip(*rows, strict=True)]
        for rows in zip(*(part.gradient for part in parts), strict=True)
    ]
    return Answer(loss, gradient, parts[0].clipped)

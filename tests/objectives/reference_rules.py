"""Advantages, weights, penalties and losses over groups, as loops over plain floats. It shares no code with the package."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import exp, log, sqrt

from tests.objectives.reference import Answer, Sample, mean, sigmoid, sum_answers

Floats = Sequence[float]


def deviation(values: Floats) -> float:
    """The unbiased one; a single value has none."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def members(groups: Sequence[int], index: int) -> list[int]:
    """Who is in the group of this response, in order."""
    return [j for j, group in enumerate(groups) if group == groups[index]]


def equal(values: Floats) -> bool:
    return max(values) == min(values)


# -- advantages ----------------------------------------------------------------------------------------------------------


def centred(rewards: Floats, groups: Sequence[int]) -> list[float]:
    """Dr.GRPO: r − mean of the group."""
    result = []
    for i, reward in enumerate(rewards):
        group = [rewards[j] for j in members(groups, i)]
        result.append(0.0 if equal(group) else reward - mean(group))
    return result


def standardised(rewards: Floats, groups: Sequence[int], epsilon: float = 1e-6) -> list[float]:
    """GRPO: (r − mean)/(std + ε)."""
    return [
        value / (deviation([rewards[j] for j in members(groups, i)]) + epsilon)
        for i, value in enumerate(centred(rewards, groups))
    ]


def leave_one_out(rewards: Floats, groups: Sequence[int]) -> list[float]:
    """RLOO: r minus the mean of the others, which is G/(G−1)·(r − mean)."""
    result = []
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in members(groups, i) if j != i]
        result.append(reward - mean(others) if others else 0.0)
    return result


def length_weighted(rewards: Floats, groups: Sequence[int], lengths: Floats) -> list[float]:
    """OPO: r − Σ L r / Σ L."""
    result = []
    for i, reward in enumerate(rewards):
        group = members(groups, i)
        total = sum(lengths[j] for j in group)
        baseline = sum(lengths[j] * rewards[j] for j in group) / total if total else mean([rewards[j] for j in group])
        result.append(reward - baseline)
    return result


def whitened(values: Floats, epsilon: float) -> list[float]:
    """Over the whole batch."""
    centre, spread = mean(values), deviation(values)
    return [0.0 if equal(values) else (value - centre) / (spread + epsilon) for value in values]


def decoupled(
    rewards: Mapping[str, Floats], groups: Sequence[int], weights: Mapping[str, float], epsilon: float, batch_epsilon: float
) -> list[float]:
    """GDPO: each reward standardised on its own, added up, whitened over the batch."""
    total = [0.0] * len(groups)
    for name, values in rewards.items():
        for i, value in enumerate(standardised(values, groups, epsilon)):
            total[i] += weights.get(name, 1.0) * value
    return whitened(total, batch_epsilon)


# -- weights -------------------------------------------------------------------------------------------------------------


def mismatch(sample: Sample) -> list[float]:
    """log ρ_t = old − rollout."""
    return [old - rollout for old, rollout in zip(sample.old, sample.rollout, strict=True)]


def truncated(sample: Sample, cap: float = 2.0) -> list[float]:
    return [min(exp(x), cap) for x in mismatch(sample)]


def icepop(sample: Sample, low: float = 0.5, high: float = 5.0) -> list[float]:
    return [exp(x) if low <= exp(x) <= high else 0.0 for x in mismatch(sample)]


def sequence_geometric(sample: Sample) -> float:
    return exp(mean(mismatch(sample)))


def sequence_product(sample: Sample) -> float:
    return exp(sum(mismatch(sample)))


def geometric_mask(sample: Sample, low: float = 0.999, high: float = 1.002) -> float:
    return 1.0 if low <= sequence_geometric(sample) <= high else 0.0


def opsm(sample: Sample, delta: float) -> float:
    gap = mean([old - new for old, new in zip(sample.old, sample.new, strict=True)])
    return 0.0 if sample.advantage < 0 and gap > delta else 1.0


def entropy_softmax(samples: Sequence[Sample], alpha: float, temperature: float) -> list[float]:
    """EGSW: exp((A + αH)/P) over its mean in the group, of the responses that have tokens."""
    groups = [sample.group for sample in samples]
    scores = [exp((s.advantage + alpha * mean(s.entropy)) / temperature) if s.length else 0.0 for s in samples]
    result = []
    for i, score in enumerate(scores):
        others = [scores[j] for j in members(groups, i) if samples[j].length]
        result.append(score / mean(others) if others else 0.0)
    return result


# -- penalties -----------------------------------------------------------------------------------------------------------

KL: dict[str, Callable[[float], tuple[float, float]]] = {  # value and derivative by x = new − reference
    "k1": lambda x: (x, 1.0),
    "k2": lambda x: (x * x / 2, x),
    "k3": lambda x: (exp(-x) - 1 + x, 1 - exp(-x)),
}


def kl_in_loss(samples: Sequence[Sample], estimator: str, coefficient: float, divide_by_tokens: bool) -> Answer:
    """β times the mean estimator, by response (each the mean over its tokens) or by token."""
    counted, tokens = sum(sample.length > 0 for sample in samples), sum(sample.length for sample in samples)
    answer = Answer(0.0, [])
    for sample in samples:
        divisor = tokens if divide_by_tokens else counted * sample.length
        pairs = [KL[estimator](new - reference) for new, reference in zip(sample.new, sample.reference, strict=True)]
        answer.loss += sum(coefficient * value / divisor for value, _ in pairs)
        answer.gradient.append([coefficient * slope / divisor for _, slope in pairs])
    return answer


def overlong(length: int, longest: int, buffer: int) -> float:
    """0 up to longest − buffer, then down to −1 at longest, and no lower."""
    excess = length - (longest - buffer)
    return 0.0 if excess <= 0 else max(-excess / buffer, -1.0)


# -- losses over groups --------------------------------------------------------------------------------------------------


def by_group(samples: Sequence[Sample]) -> list[list[int]]:
    return [[i for i, sample in enumerate(samples) if sample.group == g] for g in sorted({s.group for s in samples})]


def pairs_of(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """All unordered pairs within a group, of responses that have tokens."""
    kept = [[i for i in group if samples[i].length] for group in by_group(samples)]
    return [pair for group in kept for pair in combinations(group, 2)]


def spread(samples: Sequence[Sample], by_sample: Floats) -> list[list[float]]:
    """A derivative by a response's summed log-prob, handed to each of its tokens."""
    return [[slope] * sample.length for sample, slope in zip(samples, by_sample, strict=True)]


def rebel(samples: Sequence[Sample], eta: float = 1.0) -> Answer:
    """Mean over pairs of (Δ − Δ' − η(r − r'))²."""
    pairs, loss, slopes = pairs_of(samples), 0.0, [0.0] * len(samples)
    change = [sum(sample.differences) for sample in samples]
    for i, j in pairs:
        gap = change[i] - change[j] - eta * (samples[i].reward - samples[j].reward)
        loss += gap**2 / len(pairs)
        slopes[i] += 2 * gap / len(pairs)
        slopes[j] -= 2 * gap / len(pairs)
    return Answer(loss, spread(samples, slopes))


def trpa(samples: Sequence[Sample], beta: float = 0.1, top: float = 2.5, kl: float = 1e-3) -> Answer:
    """−mean log σ(aβ(ρ_w − ρ_l)) over pairs of different levels, a = `top` if the winner has the top one; + κ k3(new ‖ old)."""
    best = {s.group: max(o.reward for o in samples if o.group == s.group and o.length) for s in samples if s.length}
    pairs = [(i, j) if samples[i].reward > samples[j].reward else (j, i) for i, j in pairs_of(samples)]
    pairs = [(i, j) for i, j in pairs if samples[i].reward > samples[j].reward]
    rho = [mean([n - r for n, r in zip(s.new, s.reference, strict=True)]) for s in samples]
    loss, slopes = 0.0, [0.0] * len(samples)
    for winner, loser in pairs:
        scale = beta * (top if samples[winner].reward == best[samples[winner].group] else 1.0)
        h = scale * (rho[winner] - rho[loser])
        loss -= log(sigmoid(h)) / len(pairs)
        slopes[winner] -= (1 - sigmoid(h)) * scale / samples[winner].length / len(pairs)
        slopes[loser] += (1 - sigmoid(h)) * scale / samples[loser].length / len(pairs)
    near_old = [replace(sample, reference=sample.old) for sample in samples]
    return sum_answers([Answer(loss, spread(samples, slopes)), kl_in_loss(near_old, "k3", kl, True)], [1.0, 1.0])


def agro(samples: Sequence[Sample], beta: float) -> Answer:
    """Mean over groups of ½ Var[r − β(Σ new − Σ reference)]."""
    groups = [[i for i in group if samples[i].length] for group in by_group(samples)]
    groups = [group for group in groups if len(group) > 1]
    loss, slopes = 0.0, [0.0] * len(samples)
    for group in groups:
        values = {i: samples[i].reward - beta * (sum(samples[i].new) - sum(samples[i].reference)) for i in group}
        centre = mean(list(values.values()))
        loss += sum((value - centre) ** 2 for value in values.values()) / (2 * (len(group) - 1)) / len(groups)
        for i in group:
            slopes[i] -= beta * (values[i] - centre) / (len(group) - 1) / len(groups)
    return Answer(loss, spread(samples, slopes))

"""What n responses to a prompt say of a model: pure functions of which are right, and of what they answer."""

from collections import Counter
from collections.abc import Sequence
from math import comb


def pass_at(count: int, right: int, k: int) -> float:
    """The chance that one of k responses is right, k drawn from `count` of which `right` are: without bias.

    1 − C(n − c, k) / C(n, k)   (Chen et al. 2021, arXiv 2107.03374)
    """
    if not 1 <= k <= count:
        raise ValueError(f"pass@{k} of {count} responses: k is from 1 to {count}")
    return 1.0 - comb(count - right, k) / comb(count, k)


def draws(count: int) -> list[int]:
    """The k of pass@k that are worth telling: 1, 2, 4 … and all."""
    powers = [1 << power for power in range(count.bit_length()) if 1 << power < count]
    return [*powers, count]


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """The chance that the answer which most responses give is right. Who gives none (None) has no vote.

    A tie is broken by lot, and of the responses that give the answer any is taken: the expectation of that is returned. A right
    response may share its answer with a wrong one where the reward judges more than the answer.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    chances = [
        sum(ok for given, ok in zip(answers, right, strict=True) if given == answer) / most
        for answer, count in votes.items()
        if count == most
    ]
    return sum(chances) / len(chances)

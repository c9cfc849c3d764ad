"""Random responses to compute on: seeded, or drawn by hypothesis."""

import random
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from tests.objectives.reference import Sample


def sample_of(differences: list[float], advantage: float = 1.0, **more: Any) -> Sample:
    """A response given by its log-ratios; the other columns say nothing."""
    length = len(differences)
    zeros = [0.0] * length
    given: dict[str, Any] = {
        "new": list(differences),
        "old": zeros,
        "reference": zeros,
        "rollout": zeros,
        "entropy": zeros,
        "conflict": [1.0] * length,
        "token_advantage": [advantage] * length,
    }
    return Sample(**{**given, "advantage": advantage, **more})


def random_sample(generator: random.Random, length: int, group: int, spread: float) -> Sample:
    """Log-ratios of about `spread`, everything else of a natural size."""

    def numbers(low: float, high: float) -> list[float]:
        return [generator.uniform(low, high) for _ in range(length)]

    old = numbers(-3, -0.1)
    advantage = generator.choice([0.0, *[generator.uniform(-2, 2)] * 5])
    return Sample(
        new=[value + generator.uniform(-spread, spread) for value in old],
        old=old,
        reference=[value + generator.uniform(-0.5, 0.5) for value in old],
        rollout=[value + generator.uniform(-1, 1) * generator.choice([1e-3, 1.0]) for value in old],
        entropy=numbers(0.1, 1.5),
        conflict=[generator.choice([0.0, 1.0, 2.0, 4.0]) for _ in range(length)],
        token_advantage=[advantage] * length,
        advantage=advantage,
        reward=float(generator.randint(0, 3)),
        group=group,
        initial_entropy=generator.uniform(0.3, 1.0),
    )


def random_samples(generator: random.Random, groups: int, size: int, spread: float = 0.5, longest: int = 5) -> list[Sample]:
    """Some groups of responses; lengths from zero up, ratios from far inside GSPO's band to far outside GRPO's."""
    return [
        random_sample(generator, generator.randint(0, longest), group, spread) for group in range(groups) for _ in range(size)
    ]


@st.composite
def steps(draw: st.DrawFn, max_groups: int = 3, max_size: int = 4) -> list[Sample]:
    """A step's samples: singleton groups, empty responses and equal rewards among them."""
    generator = draw(st.randoms(use_true_random=False))
    spread = draw(st.sampled_from([0.0, 3e-4, 1e-3, 0.05, 0.6, 3.0]))
    sizes = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=max_groups))
    longest = draw(st.integers(0, 6))
    return [
        random_sample(generator, generator.randint(0, longest), group, spread)
        for group, size in enumerate(sizes)
        for _ in range(size)
    ]


def doubled(sample: Sample) -> Sample:
    """Every token twice."""
    names = ("new", "old", "reference", "rollout", "entropy", "conflict", "token_advantage")
    columns: dict[str, Any] = {name: [value for value in getattr(sample, name) for _ in range(2)] for name in names}
    return replace(sample, **columns)

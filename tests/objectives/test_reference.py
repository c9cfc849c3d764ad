"""The reference checks itself: its hand-made gradients are those of its values, by central differences."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.objectives import reference as plain
from tests.objectives import reference_rules as rules
from tests.objectives.reference import Answer, Sample
from tests.objectives.samples import random_samples

STEP = 1e-6

# Surrogates that stop a gradient somewhere (CISPO, GSPO-token, GTPO's ratio of one) have no value to differentiate: their
# gradient is their definition.
DIFFERENTIABLE: dict[str, Callable[[list[Sample]], Answer]] = {
    "gspo": lambda samples: plain.one_value(samples, plain.gspo, clip_low=0.1, clip_high=0.1),
    "luspo": lambda samples: plain.one_value(samples, plain.luspo, clip_low=0.1, clip_high=0.1),
    "gmpo": lambda samples: plain.one_value(samples, plain.gmpo),
    "cfpo_sequence": lambda samples: plain.one_value(samples, plain.cfpo_sequence, epsilon=0.2),
    "grpo": lambda samples: plain.value_a_token(samples, plain.grpo, dual_clip=1.3),
    "grpo_by_token": lambda samples: plain.value_a_token(samples, plain.grpo, divide_by_tokens=True),
    "sapo": lambda samples: plain.value_a_token(samples, plain.sapo),
    "abc": lambda samples: plain.value_a_token(samples, plain.abc),
    "cfpo_token": lambda samples: plain.value_a_token(samples, plain.cfpo_token, epsilon=0.2),
    "sft": lambda samples: plain.value_a_token(samples, plain.supervised, divide_by_tokens=True),
    "rebel": rules.rebel,
    "trpa": rules.trpa,
    "agro": lambda samples: rules.agro(samples, beta=0.3),
    "k1": lambda samples: rules.kl_in_loss(samples, "k1", 0.2, False),
    "k2": lambda samples: rules.kl_in_loss(samples, "k2", 0.2, True),
    "k3": lambda samples: rules.kl_in_loss(samples, "k3", 0.2, False),
}


def nudged(samples: list[Sample], i: int, t: int, step: float) -> list[Sample]:
    new = [*samples[i].new[:t], samples[i].new[t] + step, *samples[i].new[t + 1 :]]
    return [*samples[:i], replace(samples[i], new=new), *samples[i + 1 :]]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_values(name: str, seed: int) -> None:
    surrogate = DIFFERENTIABLE[name]
    samples = random_samples(random.Random(seed), groups=2, size=3)
    answer = surrogate(samples)
    for i, sample in enumerate(samples):
        for t in range(sample.length):
            up, down = (surrogate(nudged(samples, i, t, step)).loss for step in (STEP, -STEP))
            assert answer.gradient[i][t] == pytest.approx((up - down) / (2 * STEP), abs=1e-8)

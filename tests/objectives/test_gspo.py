"""GSPO on the golden numbers of its formula, and against a loop over sequences."""

import math

import pytest
import torch

from megatron_rl.objectives.base import Divisors, TokenBatch
from megatron_rl.objectives.gspo import SequencePolicyLoss

DIFFERENCES = [[2e-4, 4e-4], [1e-3, 5e-4, 3e-4], [-5e-4], [1e-4, -2e-4, 3e-4, -1e-4]]
ADVANTAGES = [1.0, -1.0, -1.0, 1.0]


def batch_of(differences: list[list[float]], advantages: list[float], garbage: float) -> tuple[TokenBatch, torch.Tensor]:
    """Flat tokens with a masked one after each sequence, whose log-prob and old log-prob are garbage."""
    new, mask, segments = [], [], []
    for i, row in enumerate(differences):
        new += [*row, garbage]
        mask += [*[True] * len(row), False]
        segments += [i] * (len(row) + 1)
    log_probs = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    masks, owners = torch.tensor(mask), torch.tensor(segments)

    def sum_sequences(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(differences), dtype=values.dtype).index_add(0, owners, torch.where(masks, values, 0.0))

    batch = TokenBatch(
        log_probs=log_probs,
        mask=masks,
        segments=owners,
        lengths=torch.tensor([float(len(row)) for row in differences]),
        columns={"old": torch.where(masks, 0.0, garbage)},
        scalars={"advantage": torch.tensor(advantages, dtype=torch.float64)},
        divisors=Divisors(sequences=len(differences), tokens=sum(map(len, differences))),
        sum_sequences=sum_sequences,
    )
    return batch, log_probs


@pytest.mark.parametrize("garbage", [0.0, 1e6, math.nan, -math.inf])
def test_golden_numbers(garbage: float) -> None:
    batch, log_probs = batch_of(DIFFERENCES, ADVANTAGES, garbage)
    result = SequencePolicyLoss()(batch)
    assert result.loss.item() == pytest.approx(-6.21632e-6, rel=1e-5)
    result.loss.backward()
    assert log_probs.grad is not None
    per_sequence = [0.125037505626, -0.083383348336, 0.0, 0.06250156252]
    expected = [-g for g, row in zip(per_sequence, DIFFERENCES, strict=True) for g in [g] * len(row)]
    assert log_probs.grad[batch.mask].tolist() == pytest.approx(expected, abs=1e-11)
    assert not log_probs.grad[~batch.mask].any()
    assert (result.metrics["clip_fraction"].total / result.metrics["clip_fraction"].count).item() == 0.25


@pytest.mark.parametrize(("advantage", "value", "gradient"), [(1.0, 1.0, 0.5), (-1.0, -1.0, -0.5)])
def test_ratios_cancel_within_a_sequence(advantage: float, value: float, gradient: float) -> None:
    """Tokens of ratio 0.5 and 2 make a sequence of ratio 1: nothing is clipped."""
    batch, log_probs = batch_of([[math.log(0.5), math.log(2.0)]], [advantage], 0.0)
    result = SequencePolicyLoss(0.2, 0.2)(batch)
    assert result.loss.item() == pytest.approx(-value)
    result.loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[batch.mask].tolist() == pytest.approx([-gradient, -gradient])

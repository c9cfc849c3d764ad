"""Metrics that objectives share: detached, cheap, each with its divisor declared.

What is a mean over tokens is summed over this rank's own (`partial`); what is of whole sequences goes through `sum_sequences`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.objectives.base import Deviation, EffectiveShare, Largest, Mean, Metric, Smallest, TokenBatch


def token_mean(batch: TokenBatch, values: Tensor) -> Mean:
    """The mean of [tokens] over all tokens that count."""
    return Mean(batch.own_sum(values), batch.own_tokens, partial=True)


def sequence_mean(batch: TokenBatch, values: Tensor) -> Mean:
    """The mean of [count] over all sequences that count."""
    return Mean(torch.where(batch.counts, values.detach().to(batch.lengths.dtype), 0.0).sum(), batch.counts.sum())


@torch.no_grad()
def sequence_ratio(batch: TokenBatch, log_ratio: Tensor) -> dict[str, Metric]:
    """Mean, spread and extremes of one ratio a sequence, from its logarithm ([count]); divisor: sequences."""
    excess = torch.where(batch.counts, torch.expm1(log_ratio.detach()), 0.0)
    sequences = batch.counts.sum()
    sums = excess.sum(), excess.abs().sum(), excess.square().sum()
    return _ratio(excess, batch.counts, sums, sequences, partial=False)


@torch.no_grad()
def token_ratio(batch: TokenBatch, log_ratio: Tensor) -> dict[str, Metric]:
    """The same of one ratio a token ([tokens]); divisor: tokens."""
    excess = torch.expm1(log_ratio.detach())
    sums = batch.own_sum(excess), batch.own_sum(excess.abs()), batch.own_sum(excess.square())
    return _ratio(excess, batch.mask, sums, batch.own_tokens, partial=True)


def _ratio(
    excess: Tensor, where: Tensor, sums: tuple[Tensor, Tensor, Tensor], count: Tensor, partial: bool
) -> dict[str, Metric]:
    total, absolute, squares = sums
    return {
        "ratio": Mean(total + count, count, partial),
        "ratio_deviation": Mean(absolute, count, partial),
        "ratio_std": Deviation(total, squares, count, partial),
        "ratio_min": Smallest(_smallest(excess, where) + 1),
        "ratio_max": Largest(-_smallest(-excess, where) + 1),
    }


def _smallest(values: Tensor, where: Tensor) -> Tensor:
    """The smallest of the values that count, +∞ of none."""
    return torch.cat([torch.where(where, values, torch.inf), values.new_full((1,), torch.inf)]).amin()


@torch.no_grad()
def clipped_sequences(batch: TokenBatch, inactive: Tensor) -> dict[str, Metric]:
    """Shares of the sequences, and of the tokens, whose gradient the clip took ([count] bool)."""
    share = inactive.to(batch.lengths.dtype)
    return {
        "clip_fraction": sequence_mean(batch, share),
        "clip_fraction_tokens": Mean((share * batch.lengths).sum(), batch.lengths.sum()),
    }


@torch.no_grad()
def clipped_tokens(batch: TokenBatch, inactive: Tensor) -> dict[str, Metric]:
    """The same of clipped tokens ([tokens] bool); the share by sequence is the mean of each sequence's share."""
    clipped = batch.sum_sequences(inactive.to(batch.lengths.dtype))  # [count]
    return {
        "clip_fraction": sequence_mean(batch, clipped / batch.lengths.clamp(min=1)),
        "clip_fraction_tokens": Mean(clipped.sum(), batch.lengths.sum()),
    }


@torch.no_grad()
def mismatch(batch: TokenBatch, log_ratio: Tensor) -> dict[str, Metric]:
    """How far the trainer's old log-probs are from the rollout engine's, x = old − rollout ([tokens]) on tokens it sampled.

    KL(rollout ‖ old): k1 = −x, k3 = e^x − 1 − x. χ² = e^(2x) − 1. Effective sample size of ρ = e^x, as a share.
    Perplexity ratio: of old over rollout, exp(mean −x) a sequence, the mean over sequences. Divisor elsewhere: tokens.
    """
    ratio = torch.exp(log_ratio)
    total, squares, tokens = batch.own_sum(ratio), batch.own_sum(ratio.square()), batch.own_tokens
    return {
        "mismatch_k1": token_mean(batch, -log_ratio),
        "mismatch_k3": token_mean(batch, torch.expm1(log_ratio) - log_ratio),
        "mismatch_chi2": Mean(squares - tokens, tokens, partial=True),
        "mismatch_perplexity_ratio": sequence_mean(batch, torch.exp(-batch.mean_tokens(log_ratio))),
        "mismatch_effective_share": EffectiveShare(total, squares, tokens, partial=True),
        "mismatch_max": Largest(-_smallest(-log_ratio.abs(), batch.mask)),
    }


@torch.no_grad()
def drift(batch: TokenBatch, log_ratio: Tensor) -> dict[str, Metric]:
    """How far the policy has moved from `old`, d = new − old: KL(old ‖ new), k1 = −d and k3 = e^d − 1 − d; divisor: tokens."""
    return {
        "old_k1": token_mean(batch, -log_ratio),
        "old_k3": token_mean(batch, torch.expm1(log_ratio) - log_ratio),
    }


@torch.no_grad()
def from_reference(batch: TokenBatch, log_ratio: Tensor) -> dict[str, Metric]:
    """How far the policy is from the reference, x = new − reference: KL(new ‖ reference), k1 = x, k3 = e^(−x) − 1 + x."""
    return {
        "reference_k1": token_mean(batch, log_ratio),
        "reference_k3": token_mean(batch, torch.expm1(-log_ratio) + log_ratio),
    }


@torch.no_grad()
def always(batch: TokenBatch, *, old_is_rollout: bool = False) -> dict[str, Metric]:
    """What every objective reports of what it was given (a clean batch).

    The mismatch is that of `old` and `rollout`. Where there is no `old`, or it is the rollout's own (`old_is_rollout`), the
    policy of this update stands for it, which has then learned from the minibatches before.
    """
    metrics: dict[str, Metric] = {}
    columns: Mapping[str, Tensor] = batch.columns
    if batch.entropy is not None:
        metrics["entropy"] = token_mean(batch, batch.entropy)
    if "advantage" in batch.scalars:
        metrics["zero_advantage"] = sequence_mean(batch, batch.scalars["advantage"] == 0)
    if "old" in columns:
        metrics |= drift(batch, batch.log_probs.detach() - columns["old"])
    if "rollout" in columns:
        scored = columns["old"] if "old" in columns and not old_is_rollout else batch.log_probs.detach()
        metrics |= mismatch(batch, scored - columns["rollout"])
    if "reference" in columns:
        metrics |= from_reference(batch, batch.log_probs.detach() - columns["reference"])
    return metrics

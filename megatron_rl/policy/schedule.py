"""Learning rate and weight decay as pure functions of the step: there is no scheduler state to save."""

import math

from megatron_rl.config.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then the chosen decay to `min_lr`."""
    warmup, peak, floor = settings.warmup_steps, settings.lr, settings.min_lr
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.lr_schedule == "constant":
        return peak
    if settings.lr_schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(warmup, 1) / max(step + 1, warmup, 1)))
    end = settings.decay_steps or total_steps
    progress = min(1.0, (step - warmup) / max(end - warmup, 1))
    return floor + (peak - floor) * _remaining(settings.lr_schedule, progress)


def weight_decay(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """The decay of optimizer step `step`, on its way from `weight_decay` to `weight_decay_end`."""
    start = settings.weight_decay
    if settings.weight_decay_schedule == "constant" or settings.weight_decay_end is None:
        return start
    progress = min(1.0, step / max(settings.decay_steps or total_steps, 1))
    return settings.weight_decay_end + (start - settings.weight_decay_end) * _remaining(
        settings.weight_decay_schedule, progress
    )


def _remaining(shape: str, progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress

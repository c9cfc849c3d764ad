"""Seconds of the trainer's phases: scoring (`old`), learning (`update`), from the layers' times and the pipeline's schedule."""

from dataclasses import dataclass, replace

from megatron_rl.config.layout_map import stage_layers, stage_size
from megatron_rl.plan.job import Job
from megatron_rl.plan.layer_time import Times, head_seconds, layer_backward, layer_forward

ADAM_BYTES = 30  # read and written of a parameter: gradient 4, master, mean and square 8 each, new weight 2


@dataclass(frozen=True)
class StageTime:
    """Seconds of one full pack on a stage."""

    forward: float
    backward: float


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of a training step's phases in the trainer, and where those of one optimizer step go."""

    old: float
    update: float
    micro_batches: int
    bubble: float  # share of an optimizer step that stages wait for each other
    packs: float  # seconds of an optimizer step's packs, with the bubble
    reduction: float  # of gradients, as far as it is not hidden
    optimizer: float
    parts: Times  # of the slowest stage, one pack forward and backward

    @property
    def optimizer_step(self) -> float:
        return self.packs + self.reduction + self.optimizer


def training_time(job: Job) -> TrainingTime:
    """Of all optimizer steps of a training step, and of scoring its sequences."""
    layout = job.layout
    stages = _stages(job)
    slowest = max(stages, key=lambda stage: stage.forward + stage.backward)
    forward, both = max(stage.forward for stage in stages), slowest.forward + slowest.backward
    packs = job.micro_batches
    waits = (layout.pipeline - 1) / layout.virtual_pipeline
    filled = fill(job)
    learning = (packs + waits) * both * filled
    reduction, optimizer = _reduction(job, both * filled), _optimizer_seconds(job)
    passes = _scoring_passes(job)
    old = passes * job.minibatches * (packs + layout.pipeline - 1) * forward * filled + _reference_swaps(job)
    return TrainingTime(
        old=old,
        update=job.updates * (learning + reduction + optimizer),
        micro_batches=packs,
        bubble=waits / (packs + waits),
        packs=learning,
        reduction=reduction,
        optimizer=optimizer,
        parts=_parts(job, stages.index(slowest)),
    )


def fill(job: Job) -> float:
    """Tokens of the mean pack over those of a full one: packs are levelled, so that all take as long."""
    tokens = job.workload.tokens / job.minibatches
    return tokens / (job.data * job.micro_batches * job.pack)


def _stages(job: Job) -> list[StageTime]:
    layout = job.layout
    kinds_there = set(job.kinds)
    forward = {moe: layer_forward(job, moe).total for moe in kinds_there}
    backward = {moe: layer_backward(job, moe).total for moe in kinds_there}
    handing_on = _handing_on(job)
    head_forward, head_backward = head_seconds(job)
    stages = []
    for stage, chunks in enumerate(stage_layers(layout, job.architecture)):
        kinds = [job.kinds[layer] for chunk in chunks for layer in chunk]
        last = stage == layout.pipeline - 1
        stages.append(
            StageTime(
                forward=sum(forward[moe] for moe in kinds) + handing_on + (head_forward if last else 0.0),
                backward=sum(backward[moe] for moe in kinds) + handing_on + (head_backward if last else 0.0),
            )
        )
    return stages


def _parts(job: Job, stage: int) -> Times:
    layers = [layer for chunk in stage_layers(job.layout, job.architecture)[stage] for layer in chunk]
    moe = sum(job.kinds[layer] for layer in layers)
    counts = {True: moe, False: len(layers) - moe}
    total = Times()
    for kind, count in counts.items():
        if count:
            total += (layer_forward(job, kind) + layer_backward(job, kind)) * count
    if stage == job.layout.pipeline - 1:
        total = replace(total, dense=total.dense + sum(head_seconds(job)))
    return total


def _handing_on(job: Job) -> float:
    """Sending a pack's hidden states to the next stage. The interleaved schedule hides it behind other chunks' work."""
    layout = job.layout
    if layout.pipeline == 1 or layout.virtual_pipeline > 1:
        return 0.0
    speed, latency = job.machine.link(stage_size(layout, job.world_size) + 1)
    return job.local * job.architecture.hidden * job.bytes / speed + latency


def _reduction(job: Job, last_pack: float) -> float:
    """Gradients scattered in float32, weights gathered, over the copies of each parameter; without a distributed optimizer
    gradients are reduced everywhere, which is twice the scatter. Overlapped, it hides behind the last pack's passes."""
    layout = job.layout
    worst = 0.0
    for parameters in job.stages:
        dense = parameters.total - parameters.experts
        seconds = 0.0
        for count, copies, span in (
            (dense, job.data * layout.context, layout.tensor * layout.context * job.data),
            (parameters.experts, job.expert_data, layout.expert * layout.expert_tensor * job.expert_data),
        ):
            if copies > 1 and count:
                speed, latency = job.machine.link(span)
                gathered = job.bytes if layout.distributed_optimizer else 4
                seconds += count * (4 + gathered) * (copies - 1) / copies / speed + 2 * latency
        worst = max(worst, seconds)
    return max(0.0, worst - last_pack) if layout.overlap_grad_reduce else worst


def _optimizer_seconds(job: Job) -> float:
    """Adam reads and writes its state once; it is sharded over the copies of each parameter."""
    speed = job.machine.memory_gb_s * 1e9 * job.machine.shares.memory
    held = []
    for parameters in job.stages:
        if job.layout.distributed_optimizer:
            dense = (parameters.total - parameters.experts) / (job.data * job.layout.context)
            held.append(dense + parameters.experts / job.expert_data)
        else:
            held.append(parameters.total)
    return max(held) * ADAM_BYTES / speed


def _scoring_passes(job: Job) -> int:
    """Forward passes before the first update: for `old`, unless it is not asked for, and for a reference."""
    objective = job.settings.objective
    if job.workload.supervised:
        return 0
    old = not objective.on_policy and objective.old_log_probs == "recompute"
    return old + (objective.reference != "none")


def _reference_swaps(job: Job) -> float:
    """A reference waits in host memory and changes places with the policy twice a minibatch, there and back."""
    if job.workload.supervised or job.settings.objective.reference == "none":
        return 0.0
    weights = max(parameters.total for parameters in job.stages) * job.bytes
    return 4 * weights / (job.machine.host_gb_s * 1e9) * job.minibatches

"""What every rank of the policy holds: exact for weights, gradients and optimizer state, reckoned for activations."""

from dataclasses import dataclass
from math import ceil

from megatron_rl.config.counting import Parameters
from megatron_rl.config.layout_map import stage_layers, stage_size
from megatron_rl.plan.activations import head_bytes, kept_activations, layer_activations
from megatron_rl.plan.job import Job

GRADIENT = 4  # bytes: gradients are gathered and reduced in float32
BUCKETS = 3  # that a rank holds beyond its weights while it publishes


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank; all ranks of a pipeline stage hold equally many."""

    stage: int
    ranks: range
    parameters: Parameters
    weights: int
    gradients: int
    optimizer: int
    fp8_weights: int  # casts that Transformer Engine keeps of a step's weights
    activations: int  # of all packs in flight
    in_flight: float  # packs whose activations the stage keeps at once
    working: int  # one layer's gradients of activations, or a unit of layers computed again
    head: int  # logits and float32 gradients of the output layer
    publishing: int  # buckets of weights, while nothing else of the step is there

    @property
    def state(self) -> int:
        """What is always there."""
        return self.weights + self.optimizer

    @property
    def peak(self) -> int:
        training = self.gradients + self.fp8_weights + self.activations + max(self.working, self.head)
        return self.state + max(training, self.gradients + self.publishing)


def rank_memory(job: Job) -> list[RankMemory]:
    """Of one rank of each pipeline stage."""
    size = stage_size(job.layout, job.world_size)
    sizes = {moe: LayerMemory.of(job, moe) for moe in set(job.kinds)}
    stages = stage_layers(job.layout, job.architecture)
    found = []
    for stage, (parameters, chunks) in enumerate(zip(job.stages, stages, strict=True)):
        layers = [sizes[job.kinds[layer]] for chunk in chunks for layer in chunk]
        found.append(_stage(job, stage, range(stage * size, (stage + 1) * size), parameters, layers))
    return found


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of a pack that a layer keeps: with what is recomputed left out, and all of it."""

    kept: float
    whole: float

    @classmethod
    def of(cls, job: Job, moe: bool) -> "LayerMemory":
        return cls(kept_activations(job, moe), sum(layer_activations(job, moe).values()))


def _stage(job: Job, stage: int, ranks: range, parameters: Parameters, layers: list[LayerMemory]) -> RankMemory:
    boundary = job.local * job.architecture.hidden * job.bytes  # what enters or leaves a stage
    flying = in_flight(job, stage)
    ends = boundary * (1 + (stage == 0) + 2 * (stage == job.layout.pipeline - 1))
    in_layers = parameters.total - parameters.embedding - parameters.output
    return RankMemory(
        stage=stage,
        ranks=ranks,
        parameters=parameters,
        weights=parameters.total * job.bytes,
        gradients=parameters.total * GRADIENT,
        optimizer=_optimizer(job, parameters),
        fp8_weights=2 * in_layers if job.fp8 else 0,
        activations=ceil(flying * (_kept(job, layers) + ends)),
        in_flight=flying,
        working=ceil(_working(job, layers)),
        head=ceil(head_bytes(job)) if stage == job.layout.pipeline - 1 else 0,
        publishing=BUCKETS * job.settings.publish.bucket_bytes,
    )


def _optimizer(job: Job, parameters: Parameters) -> int:
    """Adam's two moments in float32, and the float32 master of a bfloat16 weight; sharded over the copies of a parameter."""
    each = 8 + (4 if job.bytes == 2 else 0)
    dense = parameters.total - parameters.experts
    if not job.layout.distributed_optimizer:
        return parameters.total * each
    return ceil(dense / (job.data * job.layout.context)) * each + ceil(parameters.experts / job.expert_data) * each


def in_flight(job: Job, stage: int) -> float:
    """Packs that a stage has seen forward and not yet backward, if there are as many (one forward, one backward in turn).

    Interleaved, with v chunks a stage: 2 (p − stage − 1) + (v − 1) p + 1 chunks of 1/v of its layers each.
    """
    pipeline, virtual = job.layout.pipeline, job.layout.virtual_pipeline
    if virtual == 1:
        return pipeline - stage
    return (2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1) / virtual


def _kept(job: Job, layers: list[LayerMemory]) -> float:
    """Bytes that a stage's layers keep of one pack."""
    recompute = job.settings.recompute
    if recompute.mode != "full":
        return sum(layer.kept for layer in layers)
    inputs = job.local * job.architecture.hidden * job.bytes
    if recompute.method == "uniform":
        return inputs * ceil(len(layers) / recompute.layers)
    per_chunk = len(layers) / job.layout.virtual_pipeline
    again = round(min(recompute.layers, per_chunk) * job.layout.virtual_pipeline)
    return inputs * again + sum(layer.whole for layer in layers[again:])


def _working(job: Job, layers: list[LayerMemory]) -> float:
    """The largest layer's activations: its gradients in the backward pass, or what is computed again."""
    largest = max((layer.whole for layer in layers), default=0.0)
    recompute = job.settings.recompute
    units = recompute.layers + 1 if recompute.mode == "full" and recompute.method == "uniform" else 1
    return largest * units

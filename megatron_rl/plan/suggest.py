"""Which layouts fit, the fastest first: every combination of sizes that could be, reckoned and checked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import check
from megatron_rl.config.settings import LayoutSettings, RecomputeSettings, Settings
from megatron_rl.plan.job import Job
from megatron_rl.plan.plan import Plan

VIRTUAL = (1, 2, 3, 4)  # model chunks of a stage


@dataclass(frozen=True)
class Suggestion:
    """A layout with its plan."""

    plan: Plan

    @property
    def settings(self) -> dict[str, object]:
        """What to write into the settings, by dotted name."""
        settings = self.plan.job.settings
        layout, recompute = settings.layout, settings.recompute
        sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
        found: dict[str, object] = {f"layout.{name}": getattr(layout, name) for name in sizes}
        if layout.pipeline_layers is not None:
            found["layout.pipeline_layers"] = list(layout.pipeline_layers)
        found["recompute.mode"] = recompute.mode
        if recompute.mode == "selective":
            found["recompute.modules"] = list(recompute.modules)
        return found


def suggestions(job: Job, most: int) -> list[Suggestion]:
    """The fastest layouts for the job's ranks that fit and pass all checks, by the trainer's predicted time of a step."""
    fitting = [plan for plan in map(Plan, candidates(job)) if not plan.policy_problems]
    fitting.sort(key=lambda plan: (plan.training.old + plan.training.update, plan.largest.peak))
    found: list[Suggestion] = []
    for plan in fitting:
        colocated = job.settings.servers.colocated
        if colocated and plan.server_problems:
            continue
        if not check(plan.job.settings, job.architecture, job.world_size):
            found.append(Suggestion(plan))
        if len(found) == most:
            break
    return found


def candidates(job: Job) -> Iterator[Job]:
    """The job under every layout and recomputation that could be."""
    kinds = _recomputations(job.architecture)
    for layout in _layouts(job):
        for recompute in kinds:
            settings = job.settings.model_copy(update={"layout": layout, "recompute": recompute})
            yield replace(job, settings=settings)


def _layouts(job: Job) -> Iterator[LayoutSettings]:
    architecture, world = job.architecture, job.world_size
    experts = architecture.experts if architecture.is_moe else None
    sizes = [size for size in (2**power for power in range(world.bit_length())) if size <= world]
    tensors = [size for size in sizes if size <= job.machine.domain and _cuts(architecture, size)]
    pipelines = [size for size in sizes if size <= architecture.layers]
    parts = [size for size in sizes if (experts.count % size == 0 if experts else size == 1)]
    for tensor, pipeline, context, virtual in product(tensors, pipelines, sizes, VIRTUAL):
        stage, odd = divmod(world, pipeline)
        chunks = pipeline * virtual
        if odd or stage % (tensor * context) or chunks > architecture.layers or (virtual > 1 and pipeline == 1):
            continue
        for expert, expert_tensor in product(parts, sorted({1, tensor}) if experts else [1]):
            if stage % (expert * expert_tensor) == 0 and (experts is None or experts.hidden % expert_tensor == 0):
                yield job.layout.model_copy(
                    update={
                        "tensor": tensor,
                        "sequence_parallel": None,
                        "pipeline": pipeline,
                        "virtual_pipeline": virtual,
                        "pipeline_layers": _split(architecture.layers, chunks),
                        "context": context,
                        "expert": expert,
                        "expert_tensor": expert_tensor,
                    }
                )


def _cuts(architecture: Architecture, tensor: int) -> bool:
    heads = architecture.heads if architecture.latent_attention else architecture.kv_heads
    return heads % tensor == 0


def _split(layers: int, chunks: int) -> tuple[int, ...] | None:
    """Layers of every chunk where they do not divide: the first and the last, which also hold the vocabulary, get fewer."""
    each, extra = divmod(layers, chunks)
    if not extra:
        return None
    ends = chunks - extra
    return (each,) * (ends // 2) + (each + 1,) * extra + (each,) * (ends - ends // 2)


def _recomputations(architecture: Architecture) -> list[RecomputeSettings]:
    """Nothing, what costs little time, and everything."""
    light: tuple[str, ...] = ("layernorm",) if architecture.is_moe or architecture.latent_attention else ()
    light += ("moe_act",) if architecture.is_moe else ()
    light += ("mla_up_proj",) if architecture.latent_attention else ()
    found = [RecomputeSettings(), RecomputeSettings(mode="full")]
    if light:
        found.insert(1, RecomputeSettings.model_validate({"mode": "selective", "modules": light}))
    return found


def with_ranks(settings: Settings, ranks: int) -> Settings:
    """The settings for another number of ranks than they name."""
    layout = settings.layout.model_copy(update={"world_size": ranks})
    cluster = settings.cluster.model_copy(update={"nodes": None})
    return settings.model_copy(update={"layout": layout, "cluster": cluster})

"""A plan for people, and for programs."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_rl.config.counting import active_parameters, model_parameters
from megatron_rl.config.layout_map import stage_layers
from megatron_rl.config.rules.case import counted
from megatron_rl.config.show import collapse, shown
from megatron_rl.plan.machine import GIB
from megatron_rl.plan.plan import Plan, gib
from megatron_rl.plan.suggest import Suggestion


def render_plan(plan: Plan) -> RenderableType:
    """Assumptions, memory by stage, servers, time by phase, and the verdict."""
    parts: list[RenderableType] = [Text(_assumptions(plan)), "", _memory(plan)]
    if plan.samples:
        parts += ["", Text(_servers(plan))]
    return Group(*parts, "", _times(plan), Text(_where_time_goes(plan)), "", _verdict(plan))


def _assumptions(plan: Plan) -> str:
    job, work = plan.job, plan.job.workload
    whole = model_parameters(job.architecture).total
    active = active_parameters(job.architecture)
    layout = job.layout
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context, "data": job.data}
    experts = {"expert": layout.expert, "expert tensor": layout.expert_tensor, "copies": job.expert_data}
    lines = [
        f"{job.architecture.family}, {whole / 1e9:.1f} B parameters ({active / 1e9:.1f} B active), on {job.world_size} x "
        f"{job.machine.name}",
        _product(sizes) + (f"; experts: {_product(experts)}" if job.architecture.is_moe else ""),
        f"a step: {_responses(plan)}; assumed {work.prompt:,} tokens of a prompt, {work.response:,} "
        f"of a response on average, {work.longest:,} at most (--prompt-tokens, --response-tokens)",
        f"packs of {job.pack:,} tokens, {job.micro_batches} of them a replica and optimizer step; "
        f"recompute.mode = {job.settings.recompute.mode}",
    ]
    return "\n".join(lines)


def _responses(plan: Plan) -> str:
    work = plan.job.workload
    if work.supervised:
        return f"{work.sequences} given responses (megatron-rl sft: no servers)"
    return f"{work.groups} x {work.group_size} responses"


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


def _memory(plan: Plan) -> Table:
    columns = ("parameters", "weights", "gradients", "optimizer", "activations", "packs", "working", "peak")
    title = f"GiB of a rank, by pipeline stage ({gib(plan.limit)} to be had)"
    table = _table("stage", "ranks", "layers", *columns, title=title)
    stages = stage_layers(plan.job.layout, plan.job.architecture)
    for rank in plan.ranks:
        table.add_row(
            str(rank.stage),
            collapse(rank.ranks),
            str(sum(map(len, stages[rank.stage]))),
            f"{rank.parameters.total:,}",
            *(f"{size / GIB:.2f}" for size in (rank.weights + rank.fp8_weights, rank.gradients, rank.optimizer)),
            f"{rank.activations / GIB:.2f}",
            f"{rank.in_flight:g}",
            f"{max(rank.working, rank.head) / GIB:.2f}",
            Text(f"{rank.peak / GIB:.1f}", style="bold red" if rank.peak > plan.limit else "bold"),
        )
    return table


def _servers(plan: Plan) -> str:
    server, memory, rollout = plan.server, plan.server_memory, plan.rollout
    where = "on the policy's GPUs" if plan.job.settings.servers.colocated else "on their own"
    waiting = f", the other {rollout.requests - rollout.concurrent} wait" if rollout.requests > rollout.concurrent else ""
    return (
        f"servers: {plan.servers} of {server.gpus} GPUs, {where}; a GPU holds {gib(memory.weights)} of weights and "
        f"{gib(memory.cache)} of keys and values, a server {memory.capacity:,} tokens\n"
        f"of a server's {rollout.requests} requests {rollout.concurrent} run at once{waiting}; {rollout.tokens_per_gpu:,.0f} "
        "tokens of responses a second and GPU"
    )


def _times(plan: Plan) -> Table:
    table = _table("phase", "seconds", "share", "what it is", title="time of a step")
    training, updates = plan.training, plan.job.updates
    meaning = {
        "old": "scoring before the first update",
        "update": f"{counted(updates, 'optimizer step')} of {_seconds(training.optimizer_step)} s, "
        f"{training.bubble:.0%} of their packs' time waiting in the pipeline",
    }
    if plan.samples:
        tail = plan.rollout.tail / plan.rollout.seconds
        meaning["rollout"] = f"until the last response has ended; {tail:.0%} of it with less than a tenth of them left"
        meaning["publish"] = f"new weights to {plan.servers} servers by {plan.transport}"
    whole = plan.step_seconds
    for name, seconds in plan.phases.items():
        table.add_row(name, _seconds(seconds), f"{seconds / whole:.0%}", meaning[name])
    ahead = " (sampling runs beside learning)" if plan.samples and plan.job.settings.sampling.ahead else ""
    table.add_row("step", _seconds(whole), "", f"{plan.tokens_a_day / 1e6:,.0f} million tokens a day{ahead}", style="bold")
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds >= 10 else f"{seconds:.2f}"


def _where_time_goes(plan: Plan) -> str:
    """Of the slowest stage's work on a pack."""
    parts = {name: seconds for name, seconds in asdict(plan.training.parts).items() if seconds}
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in sorted(parts.items(), key=lambda part: -part[1]))
    return f"a pack forward and backward on the slowest stage: {shares}"


def _verdict(plan: Plan) -> Text:
    if plan.fits:
        left = plan.limit - plan.largest.peak
        return Text(f"It fits: {gib(left)} are left on the fullest rank, beyond the reserve.", style="green")
    return Text("It does not fit.", style="bold red")


def render_suggestions(found: list[Suggestion]) -> RenderableType:
    """The layouts as a table, and the first as settings to write."""
    sizes = ("tensor", "pipeline", "chunks", "context", "expert", "expert tensor", "data")
    title = "layouts that fit, the fastest first"
    table = _table("", *sizes, "recompute", "peak GiB", "old + update s", title=title)
    for number, suggestion in enumerate(found, 1):
        plan = suggestion.plan
        layout = plan.job.layout
        dense = (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.context)
        recompute = plan.job.settings.recompute
        training = plan.training
        table.add_row(
            *map(str, (number, *dense, layout.expert, layout.expert_tensor, plan.job.data)),
            recompute.mode if recompute.mode != "selective" else "+".join(recompute.modules),
            f"{plan.largest.peak / GIB:.1f}",
            _seconds(training.old + training.update),
        )
    return Group(table, Text("Write for the first:"), Text(settings_text(found[0].settings)))


def settings_text(values: dict[str, Any]) -> str:
    """Settings by dotted name as YAML sections."""
    sections: dict[str, list[str]] = {}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        sections.setdefault(section, []).append(f"  {last}: {shown(value)}")
    return "\n".join(line for section, lines in sections.items() for line in (f"{section}:", *lines))


def plan_values(plan: Plan) -> dict[str, Any]:
    """Every number of a plan under a name: what --json prints. Bytes and seconds, nothing rounded."""
    job = plan.job
    values: dict[str, Any] = {
        "machine": job.machine.name,
        "ranks": job.world_size,
        "layout": job.layout.model_dump(exclude={"world_size"}) | {"data": job.data, "expert_data": job.expert_data},
        "recompute": job.settings.recompute.model_dump(),
        "workload": asdict(job.workload) | {"tokens": job.workload.tokens},
        "parameters": {
            "model": model_parameters(job.architecture).total,
            "active": active_parameters(job.architecture),
        },
        "limit_bytes": plan.limit,
        "stages": [
            asdict(rank) | {"ranks": [rank.ranks.start, rank.ranks.stop], "total": rank.parameters.total, "peak": rank.peak}
            for rank in plan.ranks
        ],
        "micro_batches": job.micro_batches,
        "optimizer_step": {
            "packs": plan.training.packs,
            "bubble": plan.training.bubble,
            "reduction": plan.training.reduction,
            "optimizer": plan.training.optimizer,
            "parts_of_a_pack": asdict(plan.training.parts),
        },
        "phases": plan.phases,
        "step_seconds": plan.step_seconds,
        "tokens_a_day": plan.tokens_a_day,
        "fits": plan.fits,
        "problems": plan.problems,
    }
    if plan.samples:
        values["servers"] = {
            "count": plan.servers,
            "gpus_each": plan.server.gpus,
            "transport": plan.transport,
            "memory": asdict(plan.server_memory),
            "rollout": asdict(plan.rollout),
        }
    return values


def as_json(plan: Plan | None, found: Iterable[Suggestion] | None = None) -> str:
    """One plan, or the suggestions with theirs."""
    if found is None:
        assert plan is not None
        return json.dumps(plan_values(plan), indent=2)
    return json.dumps([{"settings": each.settings, "plan": plan_values(each.plan)} for each in found], indent=2)


def _table(*columns: str, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        words = column in ("phase", "what it is", "ranks", "recompute")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table

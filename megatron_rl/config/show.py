"""What a run is, for people: its settings, and which rank holds what."""

import json
from collections.abc import Iterable
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.counting import active_parameters, model_parameters, stage_parameters
from megatron_rl.config.layout_map import (
    Coordinates,
    data_size,
    expert_data_size,
    local_experts,
    rank_coordinates,
    stage_layers,
    stage_size,
)
from megatron_rl.config.names import allowed_values, setting_fields
from megatron_rl.config.settings import LayoutSettings, Settings

MOST_ROWS = 32  # of the table of one stage; the rest is left to --ranks


def render_settings(settings: Settings) -> RenderableType:
    """The whole tree. A value that differs from its default is marked, with the default beside it.

    A section in which nothing differs is one line: `megatron-rl settings` lists the defaults, the run's folder keeps all.
    """
    tree = Tree("settings  (* differs from its default)")
    sections: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in setting_fields().items():
        sections.setdefault(name.rpartition(".")[0], []).append((name, field))
    for section, members in sections.items():
        lines = [_setting_line(settings, name, field) for name, field in members]
        if not section:  # settings of no section, on the tree itself
            for line, _ in lines:
                tree.add(line)
            continue
        branch = tree.add(Text(section, style="bold"))
        if any(differs for _, differs in lines):
            for line, _ in lines:
                branch.add(line)
        else:
            branch.label = Text.assemble((section, "bold"), "  (all as by default)")
    return tree


def _setting_line(settings: Settings, name: str, field: FieldInfo) -> tuple[Text, bool]:
    """`name = value`, and whether the value is not the default."""
    value = setting_value(settings, name)
    line = Text(f"{name.rpartition('.')[2]} = {shown(value)}")
    differs = field.is_required() or value != field.default
    if differs:
        line.stylize("bold")
        line.append(" *" if field.is_required() else f" *  (default {shown(field.default)})", style="yellow")
    return line, differs


def render_setting_list() -> RenderableType:
    """Every setting that there is: name, what it may be, default, meaning."""
    table = _table("setting", "allowed", "default", "meaning")
    section = ""
    for name, field in setting_fields().items():
        if section and section != name.rpartition(".")[0]:
            table.add_section()
        section = name.rpartition(".")[0]
        default = "required" if field.is_required() else shown(field.default)
        table.add_row(Text(name), Text(allowed_values(field)), Text(default), Text(field.description or ""))
    return table


def render_layout(
    settings: Settings, architecture: Architecture, world_size: int, *, all_ranks: bool = False
) -> RenderableType:
    """The sizes, the pipeline stages with their layers, and which rank holds what: by group, or rank by rank."""
    layout = settings.layout
    coordinates = rank_coordinates(layout, world_size)
    ranks = _every_rank(layout, architecture, coordinates) if all_ranks else _one_stage(layout, architecture, world_size)
    return Group(
        Text(_sizes(layout, architecture, world_size)),
        Text(_counts(architecture)),
        "",
        _stages(layout, architecture, world_size),
        "",
        ranks,
    )


def setting_value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def shown(value: Any) -> str:
    """A value as it would be written in YAML."""
    if isinstance(value, str | Path):
        return str(value)
    return json.dumps(value, default=BaseModel.model_dump).replace('"', "")


def spans(numbers: Iterable[int]) -> list[str]:
    """`0-3` and `8` for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(start) if start == end else f"{start}-{end}" for start, end in runs]


def collapse(numbers: Iterable[int]) -> str:
    """`0-3, 8-11` for 0, 1, 2, 3, 8, 9, 10, 11."""
    parts = spans(numbers)
    if len(parts) > 6:  # copies stand at equal distances: three tell the rest
        parts = [*parts[:3], "...", parts[-1]]
    return ", ".join(parts) or "-"


def _sizes(layout: LayoutSettings, architecture: Architecture, world_size: int) -> str:
    data, copies = data_size(layout, world_size), expert_data_size(layout, world_size)
    dense = {"tensor": layout.tensor, "context": layout.context, "data": data, "pipeline": layout.pipeline}
    lines = [f"world {world_size} = {_product(dense)};  {_rank_formula(dense)}"]
    if architecture.is_moe:
        experts = {"expert_tensor": layout.expert_tensor, "expert": layout.expert, "expert_data": copies}
        experts |= {"pipeline": layout.pipeline}
        lines.append(f"experts: {world_size} = {_product(experts)};  {_rank_formula(experts)}")
    extras = {
        "sequence parallel": layout.sequence_parallel_on,
        "distributed optimizer": layout.distributed_optimizer,
        f"{layout.virtual_pipeline} virtual chunks a stage": layout.virtual_pipeline > 1,
    }
    return "\n".join([*lines, "with " + (", ".join(name for name, on in extras.items() if on) or "no extras")])


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in reversed(sizes.items()))


def _rank_formula(sizes: dict[str, int]) -> str:
    """How a rank's number comes from its coordinates, the first of which changes fastest."""
    strides = accumulate(sizes.values(), mul, initial=1)
    return "rank = " + " + ".join(f"{stride} {name}" for stride, name in zip(strides, sizes, strict=False))


def _counts(architecture: Architecture) -> str:
    whole = model_parameters(architecture)
    active = f", {active_parameters(architecture):,} active for a token" if architecture.is_moe else ""
    moe = sum(architecture.moe_layers)
    layers = f"{architecture.layers} layers" + (f" ({moe} with {_experts(architecture)})" if moe else "")
    return f"{architecture.family}: {layers}, {whole.total:,} parameters{active}"


def _experts(architecture: Architecture) -> str:
    assert architecture.experts is not None
    shared = " and shared ones" if architecture.experts.shared_hidden else ""
    return f"{architecture.experts.count} experts, {architecture.experts.top_k} chosen for a token{shared}"


def _stages(layout: LayoutSettings, architecture: Architecture, world_size: int) -> Table:
    """One row a pipeline stage."""
    table = _table("stage", "ranks", "layers", "dense", "MoE", "also", "parameters a rank", "of them experts")
    size = stage_size(layout, world_size)
    held = stage_parameters(layout, architecture)
    for stage, chunks in enumerate(stage_layers(layout, architecture)):
        layers = [layer for chunk in chunks for layer in chunk]
        moe = sum(architecture.is_moe and architecture.moe_layers[layer] for layer in layers)
        ends = [name for name, there in (("embedding", held[stage].embedding), ("output", held[stage].output)) if there]
        table.add_row(
            str(stage),
            collapse(range(stage * size, (stage + 1) * size)),
            " | ".join(collapse(chunk) for chunk in chunks),
            str(len(layers) - moe),
            str(moe),
            ", ".join(ends),
            f"{held[stage].total:,}",
            f"{held[stage].experts:,}",
        )
    return table


def _one_stage(layout: LayoutSettings, architecture: Architecture, world_size: int) -> RenderableType:
    """Who holds which part of a stage. All stages look alike: ranks are counted from the first of the stage."""
    size = stage_size(layout, world_size)
    holders: dict[tuple[int, ...], list[int]] = {}
    for place in rank_coordinates(layout, world_size)[:size]:
        part = (place.tensor, *((place.expert, place.expert_tensor) if architecture.is_moe else ()))
        holders.setdefault(part, []).append(place.rank)
    title = f"parts of a stage (ranks counted from its first, 0-{size - 1})"
    moe = ["experts", "expert shard"] if architecture.is_moe else []
    table = _table("ranks with equal weights", "dense shard", *moe, title=title)
    for (tensor, *expert), ranks in list(holders.items())[:MOST_ROWS]:
        table.add_row(collapse(ranks), f"{tensor + 1} of {layout.tensor}", *_expert_part(layout, architecture, *expert))
    if len(holders) <= MOST_ROWS:
        return table
    return Group(table, Text(f"and {len(holders) - MOST_ROWS} more groups; --ranks shows every rank"))


def _expert_part(layout: LayoutSettings, architecture: Architecture, *place: int) -> list[str]:
    """Cells about experts; none for a dense model, which has no such place."""
    if not place:
        return []
    expert, expert_tensor = place
    return [collapse(local_experts(layout, architecture, expert)), f"{expert_tensor + 1} of {layout.expert_tensor}"]


def _every_rank(layout: LayoutSettings, architecture: Architecture, coordinates: list[Coordinates]) -> Table:
    """One row a rank."""
    moe = ["expert", "expert tensor", "expert data", "experts"] if architecture.is_moe else []
    table = _table("rank", "pipeline", "data", "context", "tensor", *moe, "layers")
    stages = stage_layers(layout, architecture)
    for place in coordinates:
        cells = [place.rank, place.pipeline, place.data, place.context, place.tensor]
        if architecture.is_moe:
            cells += [place.expert, place.expert_tensor, place.expert_data]
        experts = [collapse(local_experts(layout, architecture, place.expert))] if architecture.is_moe else []
        table.add_row(*map(str, cells), *experts, " | ".join(collapse(chunk) for chunk in stages[place.pipeline]))
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column.startswith(("parameters", "of them")) else "left", overflow="fold")
    return table

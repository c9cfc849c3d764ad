"""Write the tables of docs/clusters.md: what every combination in configs/ takes, and published runs beside the plan's numbers.

`python tools/plan_docs.py`. A test compares. What stands between the page's markers is made here, the rest is written by hand.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.plan.job import Job, workload_of
from megatron_rl.plan.machine import GIB, find_machine, known_machines
from megatron_rl.plan.plan import Plan
from tools.marked_pages import with_part
from tools.plan_published import served_lines, training_lines

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "clusters.md"
DEFAULT_GPU = "h100"  # of files that name none
REFERENCE = CONFIGS / "recipes" / "gspo.yaml"  # whose responses the table reckons with


def machines_files() -> Iterator[Path]:
    """The files that put a model on machines: all that say on how many GPUs. Those in float32 are for CPUs."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        values = path.read_text(encoding="utf-8")
        if path.parent.name == "pairs" or (re.search(r"^\s*world_size: ", values, re.M) and "float32" not in values):
            yield path


def settings_of(path: Path, recipe: Path | None) -> Settings:
    return load_settings(path) if recipe is None else load_settings(recipe, [str(path)])


def planned(path: Path, recipe: Path | None) -> Plan:
    """The plan of a file, under a recipe where it has none of its own."""
    settings = settings_of(path, recipe)
    ranks = settings.world_size
    assert ranks is not None
    machine = find_machine(settings.cluster.gpu or DEFAULT_GPU)
    return Plan(Job(settings, read_architecture(settings.policy.config), ranks, machine, workload_of(settings, None, None)))


def combination_lines() -> Iterator[str]:
    """A row a combination."""
    yield "| combination | GPUs | for servers | peak of a rank | a server keeps | rollout | old + update | publish | a day |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for path in machines_files():
        recipe = REFERENCE if path.parent.name == "pairs" else None
        yield _row(path, planned(path, recipe))


def _row(path: Path, plan: Plan) -> str:
    job = plan.job
    policy = plan.policy_problems
    servers = plan.server_problems
    where = "the same" if job.settings.servers.colocated else f"{plan.servers * plan.server.gpus}"
    peak = f"{plan.largest.peak / GIB:.0f} of {plan.limit / GIB:.0f} GiB" + (" **too much**" if policy else "")
    kept = "no room" if servers else f"{plan.server_memory.capacity / 1e6:.2f} M tokens"
    name = path.relative_to(CONFIGS).with_suffix("").as_posix()
    cells = [f"[{name}](../{path.relative_to(ROOT).as_posix()})", f"{job.world_size}", where, peak, kept]
    if policy or servers:
        return f"| {' | '.join(cells)} | | | | |"
    phases = plan.phases
    times = (phases["rollout"], phases["old"] + phases["update"], phases["publish"])
    return f"| {' | '.join([*cells, *(f'{seconds:,.0f} s' for seconds in times), f'{plan.tokens_a_day / 1e6:,.0f} M'])} |"


def step_lines() -> Iterator[str]:
    """A row a pair, a column a recipe: seconds of a step, or what does not fit."""
    recipes = [path for path in sorted((CONFIGS / "recipes").glob("*.yaml")) if path not in set(machines_files())]
    pairs = [path for path in machines_files() if path.parent.name == "pairs"]
    yield f"| {' | '.join(['pair', *(path.stem for path in recipes)])} |"
    yield f"| {' | '.join('---' for _ in ('pair', *recipes))} |"
    for pair in pairs:
        plans = [planned(pair, recipe) for recipe in recipes]
        cells = [f"{plan.step_seconds:,.0f} s" if plan.fits else "does not fit" for plan in plans]
        yield f"| {' | '.join([pair.stem, *cells])} |"


def machine_lines() -> Iterator[str]:
    """A row a machine file."""
    yield "| name | device | memory | reserve | bfloat16 | FP8 | memory's speed | inside | between |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in known_machines():
        machine = find_machine(name)
        fp8 = f"{machine.tflops.fp8:,.0f} TFLOPS" if machine.tflops.fp8 else "none"
        yield (
            f"| `{name}` | {machine.name} | {machine.memory_gib:g} GiB | {machine.reserve_gib:g} GiB | "
            f"{machine.tflops.bfloat16:,.4g} TFLOPS | {fp8} | {machine.memory_gb_s:,.4g} GB/s | "
            f"{machine.inside.gb_s:g} GB/s, {machine.domain} devices | {machine.between.gb_s:g} GB/s |"
        )


TABLES = {
    "combinations": combination_lines,
    "steps": step_lines,
    "machines": machine_lines,
    "training": training_lines,
    "servers": served_lines,
}


def text() -> str:
    """The page as it should be: what stands between `<!-- name: ... -->` and `<!-- end of name -->` made anew."""
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in TABLES.items():
        page = with_part(PAGE, name, "".join(f"{line}\n" for line in lines()), page)
    return page


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")

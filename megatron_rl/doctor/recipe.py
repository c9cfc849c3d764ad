"""The settings themselves: whether they can be read, and fit the model and the number of ranks."""

from collections.abc import Iterator

from megatron_rl.config.checks import check, warnings
from megatron_rl.config.errors import UserError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.rules.case import counted
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit

FIX = "Correct it; megatron-rl train CONFIG --dry-run shows the settings and who holds what."


def check_settings(visit: Visit) -> Iterator[Finding]:
    """As `train --dry-run` does, each problem a finding."""
    if visit.config is not None and not visit.config.exists():
        yield error(f"there is no file {visit.config}", "", "Name the settings file of the run that is meant, or none.")
        return
    if visit.problem is not None:
        yield from (error(line, visit.named, FIX) for line in visit.problem.splitlines())
        return
    settings = visit.settings
    if settings is None:
        yield well("no settings are given: the machine alone is looked at", "")
        return
    try:
        architecture = read_architecture(settings.policy.config)
    except UserError as fault:
        yield error(str(fault), visit.named, FIX)
        return
    size = visit.place.world_size if visit.launched else settings.world_size or smallest_world_size(settings.layout)
    problems = check(settings, architecture, size)
    yield from (error(line, visit.named, FIX) for line in problems)
    yield from (warning(line, visit.named, FIX) for line in warnings(settings, architecture, size))
    if not problems:
        model = f"a {architecture.family} of {counted(architecture.layers, 'layer')}"
        yield well(f"the settings fit {model} on {counted(size, 'rank')}", visit.named)

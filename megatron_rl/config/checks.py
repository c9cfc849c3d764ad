"""Whether settings, model and number of ranks can work together; asked before anything is loaded.

What Megatron-core would refuse deep inside a start-up on every rank is refused here, once, with a fix. What can run and is
hardly ever wanted is warned about.
"""

from pathlib import Path

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.rules import (
    batch,
    data,
    evaluation,
    learning,
    moe,
    observe,
    precision,
    publish,
    sampling,
    servers,
    serving,
    training,
)
from megatron_rl.config.rules import layout as layout_rules
from megatron_rl.config.rules.case import Case, Rule
from megatron_rl.config.settings import LayoutSettings, PolicySettings, Settings

RULES: tuple[Rule, ...] = (
    *layout_rules.RULES,
    *moe.RULES,
    *batch.RULES,
    *precision.RULES,
    *training.RULES,
    *data.RULES,
    *sampling.RULES,
    *evaluation.RULES,
    *learning.RULES,
    *servers.RULES,
    *serving.RULES,
    *publish.RULES,
    *observe.RULES,
)
WARNINGS: tuple[Rule, ...] = (
    *training.WARNINGS,
    *precision.WARNINGS,
    *sampling.WARNINGS,
    *evaluation.WARNINGS,
    *learning.WARNINGS,
)


def check(settings: Settings, architecture: Architecture, world_size: int) -> list[str]:
    """Every problem, one line each: the settings with their values, the reason, a fix. None: the run can start."""
    case = Case(settings, architecture, world_size)
    return [line for rule in RULES for line in rule(case)]


def require_valid_layout(layout: LayoutSettings, architecture: Architecture, config: Path, world_size: int) -> None:
    """The same of a layout alone, with no run around it. `config` is where the architecture was read from."""
    case = Case(Settings(policy=PolicySettings(config=config), layout=layout), architecture, world_size)
    problems = [line for rule in layout_rules.RULES for line in rule(case)]
    if problems:
        raise SettingsError("\n".join(problems))


def require_valid(settings: Settings, architecture: Architecture, world_size: int) -> None:
    """Raise a SettingsError that lists all problems."""
    problems = check(settings, architecture, world_size)
    if problems:
        raise SettingsError("\n".join(problems))


def warnings(settings: Settings, architecture: Architecture, world_size: int, *, learns: bool = True) -> list[str]:
    """What is allowed and unwise, one line each, as `check` words it. Where nothing is learned first weights do not matter."""
    case = Case(settings, architecture, world_size)
    return [line for rule in WARNINGS if learns or rule not in training.WARNINGS for line in rule(case)]

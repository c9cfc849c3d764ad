"""Rules about what a run tells."""

from collections.abc import Iterator
from importlib.util import find_spec

from megatron_rl.config.rules.case import Case, Rule, problem


def wandb_is_told_which_project(case: Case) -> Iterator[str]:
    observe = case.settings.observe
    if observe.wandb_project is None and observe.wandb_mode != "online":
        yield problem(
            f"observe.wandb_mode = {observe.wandb_mode} without observe.wandb_project",
            "nothing is told to Weights & Biases that way",
            "Set observe.wandb_project, or remove observe.wandb_mode",
        )


def wandb_is_installed(case: Case) -> Iterator[str]:
    observe = case.settings.observe
    if observe.wandb_project is not None and observe.wandb_mode != "disabled" and find_spec("wandb") is None:
        yield problem(
            f"observe.wandb_project = {observe.wandb_project}",
            "the package wandb is not installed, and is no part of the locked environment",
            "Install it into it (uv pip install wandb), or remove observe.wandb_project",
        )


RULES: tuple[Rule, ...] = (wandb_is_told_which_project, wandb_is_installed)

"""`megatron-rl train`: train a policy, or look at what would be trained."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.cli.screen import make_console, tell_warnings, told_to_the_user
from megatron_rl.config.checks import require_valid, warnings
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import ObjectiveSettings, Settings
from megatron_rl.config.show import render_layout, render_settings
from megatron_rl.train import ranks as ranks_module
from megatron_rl.train.upstream import quiet_upstream

LOCAL_RANKS = 16  # no machine has more GPUs


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="Settings that differ from the file.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and the layout, start nothing.")] = False,
    ranks: Annotated[bool, typer.Option("--ranks", help="With --dry-run: a row for every rank.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in run.directory.")] = False,
) -> None:
    """Train a policy, or see with `--dry-run` what would be trained and which rank would hold what.

    **Settings** come from CONFIG, from the files it names under `include:`, and from overrides on the command line;
    the later wins. `megatron-rl settings` lists them all.

    **Overrides** are a dotted name, `=` and a value as in YAML: numbers (`4`, `1e-6`), `true`, `false`, `null` for "not
    set", lists in quotes for the shell's sake (`'layout.pipeline_layers=[7,8]'`). A name that does not exist is an error
    that names the nearest one.

    **Examples**

    - `megatron-rl train recipe.yaml --dry-run`
    - `megatron-rl train recipe.yaml optimizer.lr=1e-6 run.steps=200`
    - `megatron-rl train recipe.yaml layout.tensor=4 layout.expert=8 layout.world_size=64 --dry-run --ranks`
    Ranks are started on this machine when no launcher has; for several machines use torchrun or SLURM:

    - `torchrun --nproc-per-node 8 -m megatron_rl.cli train recipe.yaml`
    """
    with told_to_the_user():
        if "=" in str(config) and not config.exists():
            raise SettingsError(f"{config} is an override where the settings file should stand. Put the file first.")
        if ranks and not dry_run:
            raise SettingsError("--ranks shows the layout of a dry run. Add --dry-run.")
        settings = load_settings(config, overrides or [])
        if dry_run:
            _show_run(settings, ranks)
            return
        world_size = settings.layout.world_size or 1
        if world_size > 1 and not ranks_module.launched():
            _start_ranks(settings, world_size)
        _require_buildable(settings)
        tell_warnings(warnings(settings, read_architecture(settings.policy.config), world_size))
        quiet_upstream()
        from megatron_rl.train import toy

        toy.main(settings, resume=resume)


def _require_buildable(settings: Settings) -> None:
    """Raise a SettingsError for rewards or an objective that cannot be.

    The default objective can be: looking at it would only load torch.
    """
    if settings.rewards:
        from megatron_rl.rewards import registry

        registry.build(settings.rewards)
    if settings.objective != ObjectiveSettings():
        from megatron_rl.train import objective

        objective.build(settings.objective)


def _start_ranks(settings: Settings, world_size: int) -> None:
    """Run this same command as ranks of this machine, and end as they end."""
    if world_size > LOCAL_RANKS:
        raise SettingsError(
            f"layout.world_size = {world_size}: one machine starts {LOCAL_RANKS} ranks at most by itself. "
            "Launch the ranks with torchrun or SLURM, or look with --dry-run."
        )
    require_valid(settings, read_architecture(settings.policy.config), world_size)  # before torch is loaded so many times
    _require_buildable(settings)
    raise typer.Exit(ranks_module.start_local_ranks(world_size, sys.argv[1:]))


def _show_run(settings: Settings, all_ranks: bool) -> None:
    console = make_console()
    console.print(render_settings(settings))
    architecture = read_architecture(settings.policy.config)
    world_size = settings.layout.world_size or smallest_world_size(settings.layout)
    require_valid(settings, architecture, world_size)
    _require_buildable(settings)
    tell_warnings(warnings(settings, architecture, world_size))
    if settings.layout.world_size is None:
        console.print(f"\nlayout.world_size is not set: shown for {world_size} ranks, the fewest that hold this layout")
    console.print()
    console.print(render_layout(settings, architecture, world_size, all_ranks=all_ranks))

"""`megatron-rl train`: train a policy, or look at what would be trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_rl.cli.arguments import Overrides
from megatron_rl.cli.screen import STOPPED, make_console, tell_warnings, told_to_the_user
from megatron_rl.cli.starting import start_ranks
from megatron_rl.config.checks import require_valid, warnings
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.load import load_settings, names_settings_file
from megatron_rl.config.rules.case import counted
from megatron_rl.config.settings import ObjectiveSettings, Settings
from megatron_rl.config.show import render_layout, render_settings
from megatron_rl.train.folder import SETTINGS, require_fresh, settings_file
from megatron_rl.train.ranks import speaks
from megatron_rl.train.upstream import quiet_upstream


def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Settings file (YAML); none with --resume.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and the layout, start nothing.")] = False,
    ranks: Annotated[bool, typer.Option("--ranks", help="With --dry-run: a row for every rank.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="RUN_DIR", help="Continue the run in this folder, with its settings.", show_default=False
        ),
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Continue the run in run.directory where there is one, else begin it.")
    ] = False,
) -> None:
    """Train a policy by reinforcement learning, or see with `--dry-run` what would be trained and which rank would hold what.

    **Settings** come from CONFIG, from the files it names under `include:`, and from what follows it on the command line:
    further settings files (`.yaml`, `.yml`) and overrides, laid over it in their order; the later wins. So a recipe and the
    machines it runs on can be two files. `megatron-rl settings` lists all settings.

    **Overrides** are a dotted name, `=` and a value as in YAML: numbers (`4`, `1e-6`), `true`, `false`, `null` for "not
    set", lists in quotes for the shell's sake (`'layout.pipeline_layers=[7,8]'`). A name that does not exist is an error
    that names the nearest one.

    **Examples**

    - `megatron-rl train recipe.yaml --dry-run`
    - `megatron-rl train recipe.yaml optimizer.lr=1e-6 run.steps=200`
    - `megatron-rl train configs/recipes/gspo.yaml configs/pairs/qwen3-30b-a3b-4x8-h100.yaml run.steps=200`
    - `megatron-rl train recipe.yaml layout.tensor=4 layout.expert=8 layout.world_size=64 --dry-run --ranks`
    - `megatron-rl train --resume runs/mine run.steps=400` after a kill, a preemption, or to go on for longer

    Ranks are started on this machine when no launcher has. For several machines see `megatron-rl launch`, which writes scripts
    for SLURM, torchrun and Kubernetes.

    Told to stop (SIGTERM, Ctrl-C), a run saves and ends; `--resume` goes on as if nothing had been.
    """
    with told_to_the_user():
        if auto_resume:
            config, overrides, resume = _where_it_stands(config, overrides or [], resume)
        settings = _settings(config, overrides or [], resume)
        if ranks and not dry_run:
            raise SettingsError("--ranks shows the layout of a dry run. Add --dry-run.")
        if dry_run:
            _show_run(settings, ranks)
            return
        if resume is None:
            require_fresh(settings)
        start_ranks(settings, require_buildable)
        require_buildable(settings)
        tell_warnings(warnings(settings, read_architecture(settings.policy.config), settings.world_size or 1))
        _run(settings, resume=resume is not None)


def _run(settings: Settings, *, resume: bool) -> None:
    quiet_upstream()
    from megatron_rl.observe import observers_of
    from megatron_rl.train.run import train as run

    console = make_console()
    console.quiet = not speaks()
    state = run(settings, resume=resume, observers=observers_of(settings, console) if speaks() else ())
    folder, steps = settings.run.directory, settings.run.steps
    if not (folder / SETTINGS).exists():
        console.print("stopped before it began: there is nothing to go on with, start it again as you did")
        raise typer.Exit(STOPPED)
    if not state.over(settings):
        console.print(f"stopped at step {state.step} of {steps}, saved; go on with megatron-rl train --resume {folder}")
        raise typer.Exit(STOPPED)
    for line in _progress(folder):
        console.print(line)
    console.print(f"{steps} steps are done: {folder} (look with megatron-rl report {folder})")


def _progress(folder: Path) -> Iterator[str]:
    """How much better the run has made its policy: each source's first evaluation and its last."""
    from megatron_rl.observe.reading import RunReader

    found: dict[str, list[dict[str, Any]]] = {}
    for line in RunReader(folder).evaluations:
        found.setdefault(line["name"], []).append(line)
    for name, (first, *_, last) in ((name, lines) for name, lines in found.items() if len(lines) > 1):
        average = next(metric for metric in first["metrics"] if metric.startswith("avg@"))
        before, after = (f"{line['metrics'][average]:.3f} after {line['step']} steps" for line in (first, last))
        yield f"{name}: {average} {before}, {after}"


def _settings(config: Path | None, overrides: list[str], resume: Path | None) -> Settings:
    """Of a new run, or of the one to continue, whose folder may have been moved."""
    if resume is not None:
        changes = [*([] if config is None else [str(config)]), *overrides]
        for change in changes:
            if "=" not in change:
                raise SettingsError(f"{change}: a run goes on with its own settings. Give either CONFIG or --resume RUN_DIR.")
        return load_settings(settings_file(resume), [*changes, f"run.directory={resume}"])
    if config is None:
        raise SettingsError("there is no settings file. Give CONFIG, or --resume RUN_DIR to continue a run.")
    if "=" in str(config) and not config.exists():
        raise SettingsError(f"{config} is an override where the settings file should stand. Put the file first.")
    return load_settings(config, overrides)


def _where_it_stands(
    config: Path | None, overrides: list[str], resume: Path | None
) -> tuple[Path | None, list[str], Path | None]:
    """What to train with `--auto-resume`: as given, or the run that is there already with its settings and these overrides."""
    if resume is not None:
        raise SettingsError("--auto-resume finds out by itself whether there is a run. Give either it or --resume RUN_DIR.")
    folder = _settings(config, overrides, None).run.directory
    if not (folder / SETTINGS).exists():
        return config, overrides, None
    return None, [each for each in overrides if not names_settings_file(each)], folder


def require_buildable(settings: Settings) -> None:
    """Raise a SettingsError for rewards or an objective that cannot be.

    The default objective can be: looking at it would only load torch.
    """
    if settings.rewards:
        from megatron_rl.rewards import registry

        registry.build(settings.rewards)
    if settings.objective != ObjectiveSettings():
        from megatron_rl.train import objective

        objective.build(settings.objective)


def _show_run(settings: Settings, all_ranks: bool) -> None:
    console = make_console()
    console.print(render_settings(settings))
    architecture = read_architecture(settings.policy.config)
    world_size = settings.world_size or smallest_world_size(settings.layout)
    require_valid(settings, architecture, world_size)
    require_buildable(settings)
    tell_warnings(warnings(settings, architecture, world_size))
    if settings.world_size is None:
        least = counted(world_size, "rank")
        console.print(f"\nlayout.world_size is not set: shown for {least}, the fewest that hold this layout")
    console.print()
    console.print(render_layout(settings, architecture, world_size, all_ranks=all_ranks))

"""`megatron-rl eval`: how well a model answers."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_rl.cli.arguments import Config, Overrides
from megatron_rl.cli.screen import make_console, told_to_the_user
from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings


def evaluate(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Responses a prompt; the same as evaluation.samples=….")
    ] = None,
) -> None:
    """Evaluate a Hugging Face checkpoint on validation prompts, by the rewards of the settings.

    The model is `policy.init`. Servers are started for it on this machine, or are those that `servers.urls` or
    `servers.urls_file` name. Prompts are those that `data.validation_share` sets aside and those of `data.validation_sources`;
    how they are asked is the section `evaluation:`. Printed for each source: avg@n (share of right responses), pass@k (the
    chance that one of k is right, without bias), maj@n (whether the answer that most give is right), rewards by component,
    length, and the share that was cut off. A response is right when its reward is at least `evaluation.correct_at`.

    Every response, with its text and rewards, is kept in `evaluations` in run.directory, a Parquet file a source.

    **Examples**

    - `megatron-rl eval recipe.yaml policy.init=runs/cold-start/exports/final --samples 16`
    - `megatron-rl eval recipe.yaml evaluation.temperature=0.6 evaluation.top_p=0.95 run.directory=runs/judged`
    - `megatron-rl eval recipe.yaml 'data.validation_sources=[{path: test.jsonl, answer: solution}]'`
    - `megatron-rl eval recipe.yaml 'servers.urls=[http://node7:30000]'`
    """
    with told_to_the_user():
        settings = load_settings(config, [*(overrides or []), *([f"evaluation.samples={samples}"] if samples else [])])
        architecture = read_architecture(settings.policy.config)
        require_valid(settings, architecture, settings.world_size or smallest_world_size(settings.layout))
        _require_model(settings)
        asyncio.run(_evaluate(settings, architecture, make_console()))


def _require_model(settings: Settings) -> None:
    """There are weights that a server can load, or servers that have some."""
    servers, init = settings.servers, settings.policy.init
    if servers.model is not None or servers.urls or servers.urls_file is not None:
        return
    if init == "random":
        raise SettingsError("policy.init = random: there is no model to evaluate. Name the folder of a checkpoint.")
    if (Path(init) / "manifest.json").is_file():
        raise SettingsError(
            f"policy.init = {init}: servers load Hugging Face checkpoints, and this is one of a training run. Turn it into one "
            "with `megatron-rl convert`."
        )


async def _evaluate(settings: Settings, architecture: Architecture, console: Console) -> None:
    from megatron_rl.train.evaluation import open_alone

    if settings.servers.count != 0 and not settings.servers.urls and settings.servers.urls_file is None:
        console.print("starting servers: half a minute on a small machine, minutes for a large model")
    async with open_alone(settings, architecture) as evaluator:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("asking", total=None)
            metrics = await evaluator.evaluate(advance=lambda done, total: progress.update(task, completed=done, total=total))
        asked = {name: len(prompts) for name, prompts in evaluator.prompts.items()}
    console.print(_table(metrics, asked, settings.evaluation.samples))
    if not evaluator.tells_majority:
        console.print("no maj@n: none of the rewards can tell which answer a response gives (exact, numeric, math … can)")
    console.print(f"prompts and responses are in {settings.run.directory / 'evaluations'}")


def _table(metrics: Mapping[str, float], asked: Mapping[str, int], samples: int) -> Table:
    """Metrics as rows, sources as columns."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in asked:
        table.add_column(name, justify="right")
    table.add_row("prompts × responses", *(f"{count:,} × {samples}" for count in asked.values()))
    first = next(iter(asked))
    for metric in (name.removeprefix(f"{first}/") for name in metrics if name.startswith(f"{first}/")):
        table.add_row(metric, *(f"{metrics[f'{name}/{metric}']:.3f}" for name in asked))
    return table

"""`megatron-rl rollout`: sample into the bank, without learning."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from megatron_rl.cli.arguments import Config, Overrides
from megatron_rl.cli.screen import STOPPED, make_console, tell_warnings, told_to_the_user
from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import require_valid, warnings
from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings

if TYPE_CHECKING:
    from megatron_rl.rollout.only import Filled


def rollout(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps that the bank shall hold in the end.")] = 1,
) -> None:
    """Sample groups of responses with rewards into the bank, without learning from them.

    Starts SGLang servers on this machine, or uses those that `servers.urls` or `servers.urls_file` name; draws prompts,
    samples a group for each by `sampling.strategy`, rewards them, and seals `sampling.groups` groups a step. Run it again to
    go on: finished groups are never sampled twice, also after Ctrl-C or a kill.

    **Examples**

    - `megatron-rl rollout recipe.yaml --steps 10`
    - `megatron-rl rollout recipe.yaml 'data.sources=[{path: task:arithmetic}]' 'rewards=[{name: numeric}]' sampling.groups=8`
    - `megatron-rl bank show RUN/bank` afterwards, to look at what was said
    """
    with told_to_the_user():
        settings = load_settings(config, overrides or [])
        architecture = read_architecture(settings.policy.config)
        world_size = settings.world_size or smallest_world_size(settings.layout)
        require_valid(settings, architecture, world_size)
        tell_warnings(warnings(settings, architecture, world_size, learns=False))
        console = make_console()
        try:
            asyncio.run(_fill(settings, architecture, steps, console))
        except asyncio.CancelledError:
            console.print("stopped; what was finished is kept, and the same command goes on")
            raise typer.Exit(STOPPED) from None


async def _fill(settings: Settings, architecture: Architecture, steps: int, console: Console) -> None:
    from megatron_rl.rollout.only import fill
    from megatron_rl.rollout.session import Session

    def opened(session: Session, step: int) -> None:
        servers = ", ".join(session.pool.fleet.workers)
        console.print(f"{len(session.prompts):,} prompts; servers {servers}; step {step} of {steps} comes next")

    def starting() -> None:
        console.print("starting servers: half a minute on a small machine, minutes for a large model")

    async for filled in fill(settings, architecture, steps, opened, starting):
        console.print(_line(filled))
    console.print(f"the bank is {settings.bank_directory}: megatron-rl bank show {settings.bank_directory}")


def _line(filled: "Filled") -> str:
    collected = filled.collected
    rewards = sum(collected.rewards) / max(len(collected.rewards), 1)
    notes = {"thrown away": collected.thrown, "prompts failed": collected.failed, "cut off": collected.cut}
    notes["samples failed"] = filled.failed
    said = "".join(f"; {name} {count}" for name, count in notes.items() if count)
    return (
        f"step {collected.step}: {len(collected.keys)} groups, {filled.samples} samples, reward {rewards:.3f}, "
        f"{filled.tokens / max(filled.samples, 1):.0f} tokens a sample, {filled.tokens / filled.seconds:.0f} tokens/s{said}"
    )

"""`megatron-rl sft`: supervised fine-tuning, the cold start of reinforcement learning."""

from typing import Annotated

import typer

from megatron_rl.cli.arguments import Config, Overrides
from megatron_rl.cli.screen import STOPPED, make_console, tell_warnings, told_to_the_user
from megatron_rl.cli.starting import start_ranks
from megatron_rl.config.checks import require_valid
from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.config.rules.case import Case
from megatron_rl.config.rules.training import first_weights_are_drawn_by_chance
from megatron_rl.train.ranks import launched, speaks
from megatron_rl.train.upstream import quiet_upstream


def sft(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in run.directory.")] = False,
) -> None:
    """Teach a policy given responses to prompts (supervised fine-tuning), so that reinforcement learning has a beginning.

    Prompts are those of `data.sources`, drawn and tokenised as in training. `supervised.response` words what the policy shall
    say, from the fields of a prompt: `{answer}` by default. The response and the token that ends it are learned, in the very
    form in which the policy will write them in rollouts. Every row is looked at before training starts.

    With `data.validation_share`, or validation sources, the loss on held-out rows is measured before and after. At the end the
    model is written to `exports/final` in the run's folder, as a Hugging Face checkpoint with its tokenizer. Checkpoints go to
    `checkpoints`; with `--resume` a run that was killed continues exactly. Told to stop (SIGTERM, Ctrl-C), it saves and ends.
    `megatron-rl report` shows its curves.

    **Examples**

    - `megatron-rl sft recipe.yaml policy.init=Qwen3-30B-A3B-Base run.directory=runs/cold-start`
    - `megatron-rl sft recipe.yaml 'supervised.response="<think>{reasoning}</think>{answer}"' run.steps=500`
    - `megatron-rl sft recipe.yaml run.directory=runs/cold-start --resume`
    - `megatron-rl train recipe.yaml policy.init=runs/cold-start/exports/final` afterwards
    - `torchrun --nproc-per-node 8 -m megatron_rl.cli sft recipe.yaml` where a launcher starts the ranks
    """
    with told_to_the_user():
        settings = load_settings(config, overrides or [])
        architecture, ranks = read_architecture(settings.policy.config), settings.world_size or 1
        if not launched():
            require_valid(settings, architecture, ranks)
        start_ranks(settings)
        tell_warnings(first_weights_are_drawn_by_chance(Case(settings, architecture, ranks)))
        quiet_upstream()
        from megatron_rl.observe import observers_of
        from megatron_rl.train import supervised

        console = make_console()
        console.quiet = not speaks()
        observers = observers_of(settings, console) if speaks() else ()
        if not supervised.main(settings, resume=resume, observers=observers, console=console):
            raise typer.Exit(STOPPED)

"""The section `observe:` of the settings."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_rl.config.section import Section


class ObserveSettings(Section):
    """What a run tells of itself, beside its journal in run.directory, which is always written. See docs/report.md."""

    console: Literal["auto", "lines", "off"] = Field(
        "auto", description="lines: one line a step. auto: also a progress bar, on a terminal. off: nothing."
    )
    console_every: PositiveInt = Field(1, description="Steps from one such line to the next; the last step has one too.")
    console_metrics: tuple[str, ...] = Field(
        (), description="Further metrics in each step's line, by the names that they have in metrics.jsonl."
    )
    tensorboard: bool = Field(False, description="Also write for TensorBoard, into tensorboard/ in run.directory.")
    wandb_project: str | None = Field(
        None, description="Also tell Weights & Biases, in this project. Its package must be installed: pip install wandb."
    )
    wandb_mode: Literal["online", "offline", "disabled"] = Field(
        "online", description="offline: keep what it would be told in run.directory, for `wandb sync`. disabled: nothing."
    )
    look_every: NonNegativeInt = Field(
        10,
        description="Steps between closer looks, which take one more pass over a minibatch: the experts' load, choices of "
        "experts that the updates changed, and traces. 0: none.",
    )
    traces: NonNegativeInt = Field(
        2, description="Groups of such a step whose tokens' log-ratios and advantages are kept for the report."
    )

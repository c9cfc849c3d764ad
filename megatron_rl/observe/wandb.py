"""A run for Weights & Biases, where its package is installed."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.observe_settings import ObserveSettings
from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord


class WandbObserver:
    """Tells W&B. A resumed run goes on under the same name there."""

    def __init__(self, directory: Path, settings: ObserveSettings) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SettingsError(
                f"observe.wandb_project = {settings.wandb_project}: the package wandb cannot be imported: {error}. "
                "Install it (uv pip install wandb), or remove observe.wandb_project."
            ) from error
        self._wandb: Any = wandb
        self._directory, self._settings = directory, settings
        self._run: Any = None

    def started(self, run: RunRecord, step: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        known = hashlib.sha256(f"{self._directory.resolve()}".encode()).hexdigest()[:16]
        try:
            self._run = self._wandb.init(
                project=self._settings.wandb_project,
                mode=self._settings.wandb_mode,
                name=self._directory.name,
                id=known,
                resume="allow",
                dir=str(self._directory),
                config={**yaml.safe_load(run.settings), "versions": dict(run.versions), "ranks": run.ranks},
            )
        except self._wandb.Error as error:
            raise SettingsError(
                f"observe.wandb_project = {self._settings.wandb_project}: W&B cannot be told: {error}. "
                "Log in (wandb login), or set observe.wandb_mode=offline."
            ) from error
        # Steps of its own: W&B's may only rise, and a resumed run does some again.
        self._run.define_metric("train/*", step_metric="train/step")
        self._run.define_metric("evaluation/*", step_metric="train/step")

    def step(self, record: StepRecord) -> None:
        self._run.log({"train/step": record.step, **{f"train/{name}": value for name, value in record.metrics.items()}})

    def evaluated(self, record: EvaluationRecord) -> None:
        named = {f"evaluation/{record.name}/{name}": value for name, value in record.metrics.items()}
        self._run.log({"train/step": record.step, **named})

    def finished(self) -> None:
        self._run.finish()

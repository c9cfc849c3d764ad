"""Evaluation while a run trains: on the servers that sample for it, between two of its steps."""

from collections.abc import Mapping, Sequence

from megatron_rl.config.settings import Settings
from megatron_rl.observe.records import EvaluationRecord
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.session import Session
from megatron_rl.train.evaluation import Evaluator, open_evaluator
from megatron_rl.train.steps import Rollouts


class HeldOut:
    """Every rank has one and calls it alike; the main one's asks the servers."""

    def __init__(self, settings: Settings, policy: Policy, rollouts: Rollouts) -> None:
        """What is wrong with the validation prompts is told now."""
        self._settings, self._rollouts = settings, rollouts
        self._evaluator: Evaluator | None = None

        async def opened(session: Session) -> bool:
            self._evaluator = open_evaluator(settings, policy.architecture, session.pool, session.rewards, session.tokenizer)
            return True

        self._opened = rollouts.attend(opened) is not None

    def due(self, step: int) -> bool:
        return self._settings.evaluation.due(step, self._settings.run.steps)

    def run(self, step: int) -> Sequence[EvaluationRecord]:
        """A record a source; none when the run is told to stop meanwhile."""

        async def evaluated(_: Session) -> list[EvaluationRecord]:
            assert self._evaluator is not None
            metrics = await self._evaluator.evaluate(step)
            return [self._record(self._evaluator, name, step, metrics) for name in self._evaluator.prompts]

        return (self._rollouts.attend(evaluated) or ()) if self._opened else ()

    def _record(self, evaluator: Evaluator, name: str, step: int, metrics: Mapping[str, float]) -> EvaluationRecord:
        own = {metric.removeprefix(f"{name}/"): value for metric, value in metrics.items() if metric.startswith(f"{name}/")}
        return EvaluationRecord(step, name, own, evaluator.results(name, step).relative_to(self._settings.run.directory))

"""A training run from Python, with an observer and a reward of one's own. It needs the cold start of docs/tutorial.md.

    python docs/examples/train_in_python.py run.steps=2                              one rank, in this process
    torchrun --nproc-per-node 2 docs/examples/train_in_python.py run.steps=2         as many as torchrun starts

What stands behind it are settings that differ, as on the command line.
"""

import sys

from megatron_rl import load_settings, observers_of, train
from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord
from megatron_rl.train.upstream import quiet_upstream

OVERRIDES = [
    "layout.world_size=null",  # as many ranks as there are
    "layout.expert=1",
    "rewards=[{name: exact}, {name: 'my_rewards:in_place', as: close, weight: 0.5}]",
    "evaluation.correct_at=1.5",  # what a right answer earns from the two
    "run.directory=runs/in-python",
]


class Best:
    """An observer: it remembers the step that earned most."""

    def __init__(self) -> None:
        self.step_number, self.reward = -1, float("-inf")

    def started(self, run: RunRecord, step: int) -> None:
        print(f"{run.model} with {run.parameters:,} parameters on {run.ranks} ranks, from step {step}")

    def step(self, record: StepRecord) -> None:
        if record.metrics["reward/mean"] > self.reward:
            self.step_number, self.reward = record.step, record.metrics["reward/mean"]

    def evaluated(self, record: EvaluationRecord) -> None:
        print(f"{record.name} after {record.step} steps: {record.metrics}")

    def finished(self) -> None:
        print(f"step {self.step_number} earned most: {self.reward:.3f}")


def main() -> None:
    quiet_upstream()  # warnings of packages below that nobody can act on
    settings = load_settings("configs/quickstart.yaml", [*OVERRIDES, *sys.argv[1:]])
    state = train(settings, observers=[*observers_of(settings), Best()])  # told on the main rank alone
    print(f"{state.step} of {settings.run.steps} steps are done")


if __name__ == "__main__":
    main()

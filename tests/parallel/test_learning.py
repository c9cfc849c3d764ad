"""A run's steps on a fixed bank: every layout learns the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_rl.config.settings import Settings
from megatron_rl.policy.hf_export import save_hf
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.reference import Reference
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.train import objective
from megatron_rl.train.learner import Learner
from tests.parallel.cluster import Cluster
from tests.policy.single import tiny_settings
from tests.train.steps import sealed_steps

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "data 2": (2, {}),
    "expert 2": (2, {"expert": 2}),
    "tensor 2 with sequence": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "context 2": (2, {"context": 2}),
    "tensor 2, expert 2, pipeline 2": (4, {"tensor": 2, "expert": 2, "pipeline": 2}),
}
TOLERANCE = 1e-5  # of weights of size 1e-2 that 6 updates of 1e-3 have moved


def learn(launch: Launch, settings: dict[str, Any], bank: Path, folder: Path) -> tuple[dict[str, float], list[list[int]]]:
    """Three steps; leaves the weights in a folder and returns the last step's metrics, and where experts' tokens went."""
    policy = Policy.open(Settings(**settings), launch)
    goal, advantage = objective.build(policy.settings.objective)
    learner = Learner(policy, goal, advantage, policy.settings, Reference(policy))
    for step in range(STEPS):
        with BankReader(bank) as reader, reader.step(step) as rows:
            report = learner.learn(step, rows, traces=1)
    save_hf(policy, folder, "float32")
    assert report.look is not None and report.look.expert_tokens is not None
    assert len(report.look.traces) == (4 if launch.rank == 0 else 0)
    return dict(report.metrics), report.look.expert_tokens.tolist()


@pytest.mark.parametrize(("surrogate", "layouts"), [("gspo", [*LAYOUTS]), ("grpo", ["context 2"])])
def test_ranks_do_not_matter(surrogate: str, layouts: list[str], cluster: Cluster, tmp_path: Path) -> None:
    """GRPO, whose ratios are of tokens, where a sequence is cut: all else is the same for both."""
    sealed_steps(tmp_path / "bank", STEPS)
    objective: dict[str, Any] = {"surrogate": surrogate, "reference": "initial", "penalties": [{"name": "kl_loss"}]}

    def run(name: str, ranks: int, layout: dict[str, int]) -> tuple[dict[str, float], Any, dict[str, Any]]:
        settings = tiny_settings(
            tmp_path / name,
            layout=layout,
            optimizer={"lr": 1e-3, "eps": 1e-3},  # above the noise of gradients that are zero but for rounding
            batch={"max_tokens": 64, "minibatches": 2},
            objective=objective,
        )
        arguments = {"settings": settings.model_dump(), "bank": tmp_path / "bank", "folder": tmp_path / name / "learned"}
        (metrics, tokens), *others = cluster.run("tests.parallel.test_learning:learn", ranks, **arguments)
        assert all(each == (metrics, tokens) for each in others)
        return metrics, np.array(tokens), load_file(tmp_path / name / "learned" / "model.safetensors")

    first = load_file(_first(tmp_path))
    metrics, tokens, weights = run("one", 1, {})
    moved = max(np.abs(weights[name] - first[name]).max() for name in weights)
    assert moved > 100 * TOLERANCE
    for name in layouts:
        found, loads, learned = run(name, *LAYOUTS[name])
        assert loads.sum() == tokens.sum() and np.abs(loads - tokens).max() <= 1, name  # a near tie may go either way
        assert found == pytest.approx(metrics, rel=1e-3, abs=1e-5), name
        assert learned.keys() == weights.keys()
        for tensor, values in weights.items():
            np.testing.assert_allclose(learned[tensor], values, rtol=0, atol=TOLERANCE, err_msg=f"{name}: {tensor}")


def _first(folder: Path) -> Path:
    """The weights that all begin with."""
    from tests.policy.single import opened

    with opened(tiny_settings(folder / "first")) as policy:
        return save_hf(policy, folder / "first" / "weights", "float32") / "model.safetensors"

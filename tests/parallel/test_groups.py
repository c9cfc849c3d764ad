"""Losses of whole groups over real ranks: responses of a group on different replicas, stages and shards, the same as on one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.config.settings import Settings
from megatron_rl.objectives.base import GroupObjective
from megatron_rl.policy.group_pass import prepare_groups
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.types import Sequence
from tests.parallel.cluster import Cluster
from tests.parallel.jobs import Arrays, gradients
from tests.policy.single import tiny_settings
from tests.policy.test_group_pass import OBJECTIVES, group_sequences

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "two replicas": (2, {}),
    "two replicas of two stages": (4, {"pipeline": 2}),
    "two replicas of two context shards": (4, {"context": 2}),
    "two replicas of two tensor shards": (4, {"tensor": 2}),
}
# Of the largest number of a tensor, in float32: sums in another order, also those that the slopes are made of.
TOLERANCE = 2e-5

Stepped = tuple[float, dict[str, float], Arrays]


def step_on_groups(launch: Launch, settings: dict[str, Any], sequences: list[Sequence], objective: GroupObjective) -> Stepped:
    """One prepared step: its loss, metrics and gradient."""
    policy = Policy.open(Settings(**settings), launch)
    report = policy.update(prepare_groups(policy, policy.pack(sequences), objective), objective)
    return report.loss, dict(report.metrics), gradients(policy)


def run(cluster: Cluster, folder: Path, name: str, ranks: int, layout: dict[str, int]) -> Stepped:
    settings = tiny_settings(folder, "qwen3", layout=layout, optimizer={"lr": 0.0, "clip_grad": 0.0}, batch={"max_tokens": 32})
    arguments = {"settings": settings.model_dump(), "sequences": group_sequences(), "objective": OBJECTIVES[name]}
    results: list[Stepped] = cluster.run("tests.parallel.test_groups:step_on_groups", ranks, **arguments)
    assert all(result[:2] == results[0][:2] for result in results)
    return results[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_do_not_matter(name: str, cluster: Cluster, tmp_path: Path) -> None:
    expected = run(cluster, tmp_path / "one", name, 1, {})
    for layout, (ranks, sections) in LAYOUTS.items():
        loss, metrics, gradient = run(cluster, tmp_path / layout, name, ranks, sections)
        assert loss == pytest.approx(expected[0], rel=TOLERANCE), layout
        assert metrics == pytest.approx(expected[1], rel=TOLERANCE, abs=1e-6), layout
        for parameter, values in expected[2].items():
            atol = TOLERANCE * np.abs(values).max()
            np.testing.assert_allclose(gradient[parameter], values, rtol=0, atol=atol, err_msg=f"{layout}: {parameter}")

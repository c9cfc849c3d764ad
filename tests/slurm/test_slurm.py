"""A job on a real SLURM. `tests/slurm/run.sh` plays more: servers, a lost node, priority, a sweep."""

from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.scenarios import Stage, same, stopped_midway
from tests.train.steps import sealed_steps

STEPS = 24


def test_a_job_that_was_told_to_stop_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """It saves, goes back into the queue by itself, and learns what a job beside it learns without a break."""
    sealed_steps(tmp_path / "bank", STEPS)
    with Cluster(tmp_path / "slurm", nodes=4) as cluster:
        stage = Stage(cluster)
        jobs = [stage.launch(name, f"bank.replay={tmp_path / 'bank'}", steps=STEPS) for name in ("told", "left-alone")]
        stopped_midway(stage, "told", jobs[0])
        assert cluster.ended(jobs[1]) == "COMPLETED 0:0"
        same(stage, "told", "left-alone", STEPS)

"""What has to come to pass on a cluster, played on a real SLURM: `tests/slurm/run.sh`.

Each scenario submits what `megatron-rl launch` writes, does something to it, and returns what it saw; it raises where that is
not what is promised. The model is a toy, ranks speak gloo, a node is a process on this machine; the rest is as anywhere.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_rl.train.toy_model import write_toy_model
from megatron_rl.weights.toy_model import ToyShape
from tests.slurm.cluster import ROOT, Cluster
from tests.train.runs import learned, metrics

RECIPE = f"""\
include: {ROOT}/configs/quickstart.yaml
policy: {{init: toy}}
rewards: [{{name: length, options: {{high: 6}}}}]
data: {{validation_share: 0}}
sampling: {{groups: 4, group_size: 4, max_new_tokens: 16, stop_token_ids: {list(range(3, 259, 16))}}}
evaluation: {{every: 0}}
checkpoint: {{every: 2, export_every: 100, grace_seconds: 60}}
observe: {{look_every: 0, traces: 0}}
cluster: {{nodes: 2, gpus_per_node: 1}}
launch: {{venv: {sys.prefix}, time: "10:00"}}
device: {{threads: 1}}
"""
STEPS = 8


class Stage:
    """A cluster with the toy and its recipe, and the runs that were made on it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.recipe = cluster.place / "recipe.yaml"
        self.recipe.write_text(RECIPE)
        write_toy_model(cluster.place / "toy", ToyShape())

    def folder(self, name: str) -> Path:
        return self.cluster.place / "runs" / name

    def launch(self, name: str, *words: str, steps: int = STEPS) -> int:
        return self.cluster.launch(str(self.recipe), f"run.directory={self.folder(name)}", f"run.steps={steps}", *words)

    def log(self, name: str, job: int) -> str:
        path = self.folder(name) / f"launch/slurm-{job}.log"
        return path.read_text() if path.exists() else ""

    def rank_log(self, name: str, job: int, rank: int = 0) -> str:
        return (self.folder(name) / f"launch/job-{job}/rank-{rank}.log").read_text()

    def until_steps(self, name: str, steps: int) -> None:
        self.cluster.until(f"step {steps} of {name}", lambda: len(metrics(self.folder(name))) >= steps)

    def require(self, name: str, job: int, *phrases: str) -> None:
        """The job's log says this, in this order."""
        log = self.log(name, job)
        place = 0
        for phrase in phrases:
            place = log.find(phrase, place)
            assert place >= 0, f"the log does not say {phrase!r} where it should:\n{log}"


def completes(stage: Stage, name: str = "whole") -> str:
    """Two nodes train, a third serves, in one allocation."""
    job = stage.launch(name, "cluster.server_nodes=1")
    state = stage.cluster.ended(job)
    assert state == "COMPLETED 0:0", f"{state}\n{stage.log(name, job)}"
    stage.require(name, job, "ranks on n1 n2; servers on n3", "ranks ended with 0", "done")
    assert [line["step"] for line in metrics(stage.folder(name))] == list(range(STEPS))
    logs = sorted(path.name for path in (stage.folder(name) / f"launch/job-{job}").glob("*.log"))
    assert logs == ["rank-0.log", "rank-1.log", "serve-0.log"], logs
    urls = (stage.folder(name) / f"launch/job-{job}/urls").read_text()
    assert urls == "", f"servers have left their URLs behind: {urls}"
    return f"{state}, {STEPS} steps"


def preempted(stage: Stage, name: str = "preempted") -> str:
    """Told to stop midway, as at the end of its time: it saves, is queued again, goes on, and learns what it would have."""
    job = stage.launch(name, "cluster.server_nodes=1")
    state = stopped_midway(stage, name, job)
    whole = f"{name}-replayed"
    other = stage.launch(whole, f"bank.replay={stage.folder(name) / 'bank'}")
    assert stage.cluster.ended(other) == "COMPLETED 0:0", stage.log(whole, other)
    return f"{state}; {same(stage, name, whole)}"


def stopped_midway(stage: Stage, name: str, job: int) -> str:
    stage.until_steps(name, 3)
    stage.cluster.ask("scancel", "--signal=TERM", "--batch", str(job))
    state = stage.cluster.ended(job, 200)
    assert state == "COMPLETED 0:0", f"{state}\n{stage.log(name, job)}"
    assert stage.cluster.of_job(job, "Restarts") == "1"
    stage.require(name, job, "told to stop", "ranks ended with 143", "back into the queue", "start 1:", "ranks ended with 0")
    assert "stopped at step" in stage.rank_log(name, job)
    return f"{state}, 1 restart"


def same(stage: Stage, name: str, whole: str, steps: int = STEPS) -> str:
    """As a run without a break over the same samples: weights, moments, random states and metrics, bit for bit."""
    run, other = stage.folder(name), stage.folder(whole)
    assert [line["step"] for line in metrics(run)] == list(range(steps))
    assert learned(run) == learned(other)
    found = sorted(path.relative_to(other) for path in other.glob(f"*/step_{steps:08}/*.safetensors"))
    assert {path.parts[0] for path in found} == {"checkpoints", "exports"}, found
    differing = [str(path) for path in found if (other / path).read_bytes() != (run / path).read_bytes()]
    assert not differing, differing
    return f"{len(found)} files of weights and moments as uninterrupted, bit for bit"


def loses_a_node(stage: Stage, name: str = "bereft", source: str = "preempted") -> str:
    """A node dies midway: its job is queued again, waits for a node, goes on, and learns the same. Samples are a bank's."""
    bank = stage.folder(source) / "bank"
    job = stage.launch(name, f"bank.replay={bank}", "checkpoint.every=1")
    stage.until_steps(name, 2)
    stage.cluster.kill_node("n2")
    died = time.monotonic()
    stage.cluster.until("the job to leave the node", lambda: stage.cluster.of_job(job, "JobState") != "RUNNING")
    stage.cluster.start_node("n2")
    state = stage.cluster.ended(job, 200)
    assert state == "COMPLETED 0:0", f"{state}\n{stage.log(name, job)}"
    stage.require(name, job, "Node failure on n2", "start 1:", "ranks ended with 0")
    done = same(stage, name, f"{source}-replayed")
    return f"{state} {time.monotonic() - died:.0f} s after the node died; {done}"


def preempted_by_a_job(stage: Stage, name: str = "displaced") -> str:
    """A job of a partition with priority takes the nodes; SLURM itself tells the run to stop, and it comes back after."""
    job = stage.launch(name, "cluster.server_nodes=1")
    stage.until_steps(name, 2)
    other = int(
        stage.cluster.ask("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--wrap=sleep 3", "--output=/dev/null")
    )
    state = stage.cluster.ended(other, 200)
    assert state == "COMPLETED 0:0", state
    state = stage.cluster.ended(job, 200)
    assert state == "COMPLETED 0:0", f"{state}\n{stage.log(name, job)}"
    assert "stopped at step" in stage.rank_log(name, job)
    stage.require(name, job, "ranks ended with 143", "start 1:", "ranks ended with 0")
    assert [line["step"] for line in metrics(stage.folder(name))] == list(range(STEPS))
    return f"{state} after a job of higher priority"


def attaches(stage: Stage, name: str = "attached") -> str:
    """Servers are a job of their own; a run finds them by a file, ends, and leaves them for the next."""
    urls = stage.cluster.place / "urls"
    shared = [f"servers.urls_file={urls}", "cluster.server_nodes=1"]
    servers = stage.launch(f"{name}-servers", *shared, "--part", "servers")
    job = stage.launch(name, *shared, "--part", "train")
    state = stage.cluster.ended(job)
    assert state == "COMPLETED 0:0", f"{state}\n{stage.log(name, job)}"
    assert stage.cluster.of_job(servers, "JobState") == "RUNNING"
    assert urls.read_text().startswith("http://")
    assert urls.with_name("urls.key").stat().st_mode & 0o777 == 0o600
    stage.cluster.ask("scancel", str(servers))
    left = stage.cluster.ended(servers)
    stage.cluster.until("its URL to vanish", lambda: urls.read_text() == "")
    return f"{state}; the servers' job {left}, their URL gone"


def colocated(stage: Stage, name: str = "colocated") -> str:
    """Servers on the nodes of the ranks, which sleep while the policy learns."""
    folder = stage.cluster.place / "weights"
    job = stage.launch(name, "servers.placement=colocated", f"publish.folder={folder}", "sampling.groups=2", steps=3)
    state = stage.cluster.ended(job, 240)
    assert state == "COMPLETED 0:0", f"{state}\n{stage.log(name, job)}"
    stage.require(name, job, "ranks on n1 n2; servers on n1 n2", "ranks ended with 0")
    told = metrics(stage.folder(name))  # nobody is published to after the last step
    assert [line.get("publish/servers") for line in told[:-1]] == [2, 2] and all("seconds/sleep" in line for line in told), told
    return f"{state}, 2 servers beside 2 ranks"


def fails(stage: Stage, name: str = "broken") -> str:
    """A part that cannot start ends the job, at once and with its code; nothing is queued again."""
    job = stage.launch(name, "cluster.server_nodes=1", "servers.model=nowhere/at/all")
    state = stage.cluster.ended(job)
    assert state.startswith("FAILED") and not state.startswith("FAILED 0:"), state
    assert stage.cluster.of_job(job, "Restarts") == "0"
    stage.require(name, job, "servers ended with")
    return f"{state}, no restart"


def loses_a_rank(stage: Stage, name: str = "short of one") -> str:
    """One that dies while others wait for it ends the job, which is not taken for one that was told to stop and has saved."""
    job = stage.launch(name)
    stage.cluster.until("rank 1", lambda: stage.cluster.kill_rank(1))
    state = stage.cluster.ended(job, 240)
    assert state.startswith("FAILED") and not state.startswith(("FAILED 0:", "FAILED 143:")), f"{state}\n{stage.log(name, job)}"
    assert stage.cluster.of_job(job, "Restarts") == "0"
    stage.require(name, job, "task 1: Killed", "ranks ended with", "failed with")
    return f"{state}, no restart"


def sweeps(stage: Stage, name: str = "sweep", source: str = "preempted") -> str:
    """A job array, one run a line, of words that a shell would make something of."""
    hostile = "$(touch hostile); `touch hostile`"
    lines = stage.cluster.place / "runs.txt"
    lines.write_text(f"optimizer.lr=1e-4\n# a comment\noptimizer.lr=2e-4 'run.directory={stage.folder(name)}/{hostile}'\n")
    replay = f"bank.replay={stage.folder(source) / 'bank'}"
    job = stage.launch(name, replay, "--sweep", str(lines), steps=2)
    stage.cluster.until("both runs", lambda: not stage.cluster.ask("squeue", "--noheader", f"--jobs={job}").strip())
    rates = [metrics(stage.folder(name) / folder)[-1]["lr"] for folder in ("000", hostile)]
    assert rates[1] == 2 * rates[0], rates
    assert not list(stage.cluster.place.rglob("hostile"))
    return f"2 runs, learning rates {rates}"


SCENARIOS: dict[str, Callable[[Stage], str]] = {
    "completes": completes,
    "preempted": preempted,
    "loses a node": loses_a_node,
    "preempted by a job": preempted_by_a_job,
    "servers apart": attaches,
    "colocated": colocated,
    "a part fails": fails,
    "a rank dies": loses_a_rank,
    "sweep": sweeps,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=list(SCENARIOS), help="may be repeated; 'loses a node' and 'sweep' need 'preempted'"
    )
    parser.add_argument("--folder", type=Path, help="where everything goes, and stays; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megatron-rl-slurm-") as temporary:
        place = options.folder or Path(temporary)
        with Cluster(place) as cluster:
            stage = Stage(cluster)
            rows = [(name, *played(stage, SCENARIOS[name])) for name in options.only or SCENARIOS]
    print(f"\n{'scenario':<20} {'seconds':>7}  seen")
    for name, seconds, seen, _ in rows:
        print(f"{name:<20} {seconds:>7.0f}  {seen}")
    return int(not all(well for *_, well in rows))


def played(stage: Stage, scenario: Callable[[Stage], str]) -> tuple[float, str, bool]:
    begun = time.monotonic()
    try:
        seen, well = scenario(stage), True
    except Exception as error:
        print(f"{scenario.__name__}: {error}", flush=True)
        seen, well = f"FAILED: {str(error).splitlines()[0] if str(error) else type(error).__name__}", False
    return time.monotonic() - begun, seen, well


if __name__ == "__main__":
    sys.exit(main())

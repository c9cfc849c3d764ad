"""The batch script: what it asks for, and that nothing in it becomes another command, whatever the settings hold."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.rules.launching import Part
from megatron_rl.launch.job import Job, sweep_of
from megatron_rl.launch.slurm import batch_script
from tests.launch.jobs import CLUSTER, ROOT, recipe, settings_of

HOSTILE = [
    "$(touch hostile)",
    "`touch hostile`",
    "; touch hostile #",
    "'; touch hostile; '",
    '"; touch hostile; "',
    "a b\tc",
    "*",
]
JOB = "#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n"


def job_of(
    folder: Path,
    *overrides: str,
    part: Part = "all",
    words: Sequence[str] = (),
    sweep: tuple[tuple[str, ...], ...] = (),
    checkout: Path = ROOT,
) -> Job:
    return Job(settings_of(folder, *overrides), ("tiny.yaml", *words), folder, checkout, part, sweep)


def asked(script: str) -> dict[str, str]:
    """Options that sbatch reads."""
    return {name: value for name, _, value in re.findall(r"^#SBATCH --([\w-]+)(=(.*))?$", script, re.M)}


def called(folder: Path, job: Job, **environment: str) -> list[str]:
    """The words with which the script calls what runs on the nodes."""
    place = job.checkout / "launch/slurm"
    place.mkdir(parents=True, exist_ok=True)
    (place / "job.sh").write_text(JOB)
    (place / "job.sh").chmod(0o755)
    said = subprocess.run(
        ["bash", "-c", batch_script(job)], cwd=folder, capture_output=True, check=True, env={**os.environ, **environment}
    )
    return said.stdout.decode().split("\0")[:-1]


def test_training_and_servers_in_one_allocation(tmp_path: Path) -> None:
    overrides = ["launch.partition=gpu", "launch.gres=gpu:4", "launch.time=7-00", "launch.sbatch=[--constraint=h100]"]
    job = job_of(tmp_path, *overrides, "checkpoint.grace_seconds=120", checkout=tmp_path / "its checkout")
    options = asked(batch_script(job))
    assert (options["nodes"], options["ntasks-per-node"]) == ("3", "4")
    assert (options["partition"], options["gres"], options["time"], options["constraint"]) == ("gpu", "gpu:4", "7-00", "h100")
    assert options["signal"] == "B:TERM@180" and "requeue" in options and options["open-mode"] == "append"
    assert options["output"] == f'"{tmp_path}/runs/tiny/launch/slurm-%j.log"' and options["chdir"] == f'"{tmp_path}"'
    words = called(tmp_path, job)
    given = dict(zip(words[::2], words[1::2], strict=False))
    assert (given["--nodes"], given["--ranks-per-node"], given["--server-nodes"], given["--servers-per-node"]) == (
        "2",
        "4",
        "1",
        "4",
    )
    assert given["--python"] == f"{tmp_path}/its checkout/.venv/bin/python"
    assert words[words.index("--") + 1 :] == ["tiny.yaml"]


def test_nothing_is_asked_of_nodes_without_gpus(tmp_path: Path) -> None:
    assert not {"gres", "partition", "account", "qos", "time", "array"} & asked(batch_script(job_of(tmp_path))).keys()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.gpu=h100"], "gpu:4"), (["cluster.gpu=h100", "launch.gres=gpu:h100:4"], "gpu:h100:4"),
        (["cluster.gpu=h100", "launch.gres=none"], None), (["cluster.gpu=cpu"], None),
        (["cluster.gpu=h100", "launch.sbatch=[--gpus-per-node=4]"], None),
    ],
)  # fmt: skip
def test_gpus_are_asked_for_where_there_are_any(tmp_path: Path, overrides: list[str], expected: str | None) -> None:
    """SLURM shows a step those alone that its job has asked for, also on nodes that the job has for itself."""
    assert asked(batch_script(job_of(tmp_path, *overrides))).get("gres") == expected


def test_servers_of_a_job_are_its_own(tmp_path: Path) -> None:
    """Two jobs of one folder would else find each other's in a shared file, and one that lost a node its dead ones."""
    job = job_of(tmp_path, "servers.urls_file=urls", "servers.api_key_file=key", checkout=tmp_path / "checkout")
    words = called(tmp_path, job)
    assert "--urls" not in words and words[words.index("--api-key-file") + 1] == f"{tmp_path}/key"


@pytest.mark.parametrize(
    ("part", "nodes", "expected"), [("train", "2", ["--nodes", "2"]), ("servers", "1", ["--nodes", "0", "--server-nodes", "1"])]
)
def test_parts_have_their_own_nodes(tmp_path: Path, part: Part, nodes: str, expected: list[str]) -> None:
    overrides = ["servers.urls_file=shared/urls", "servers.api_key_file=key", "servers.count=2"]
    job = job_of(tmp_path, *overrides, part=part, checkout=tmp_path / "checkout")
    assert asked(batch_script(job))["nodes"] == nodes
    words = called(tmp_path, job)
    assert all(word in words for word in expected)
    assert ("servers.count=0" in words) is (part == "train")  # its own count is that of the servers' machines
    assert words[words.index("--urls") + 1] == f"{tmp_path}/shared/urls"  # the same for both, wherever they are started


def test_colocated_servers_on_several_machines_are_started_beside_the_ranks(tmp_path: Path) -> None:
    job = job_of(tmp_path, "servers.placement=colocated", "cluster.server_nodes=0", checkout=tmp_path / "checkout")
    assert asked(batch_script(job))["nodes"] == "2" and "--colocated" in called(tmp_path, job)
    alone = job_of(tmp_path, "servers.placement=colocated", "cluster.nodes=1", "cluster.server_nodes=0")
    assert "--colocated" not in batch_script(alone)  # there the run starts its own


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_words_stay_words(tmp_path: Path, text: str) -> None:
    words = (f"rewards=[{{name: {text}}}]", text)
    sweep = ((f"run.seed=1{text}", text), ("run.seed=2",))
    folder = tmp_path / f"here {text.replace('/', '')}"
    folder.mkdir()
    job = job_of(folder, f"launch.container='{text.replace(chr(39), '')}'", words=words, sweep=sweep, checkout=folder / "co")
    found = called(folder, job, SLURM_ARRAY_TASK_ID="0")
    assert found[found.index("--") + 1 :] == ["tiny.yaml", *words, *sweep[0]]
    assert found[found.index("--container") + 1] == text.replace("'", "")
    assert not list(tmp_path.rglob("hostile"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_variables_stay_values(tmp_path: Path, text: str) -> None:
    if not text.isprintable():
        text = "$'\\t'"
    job = job_of(tmp_path, checkout=tmp_path / "checkout")
    launch = job.settings.launch.model_copy(update={"environment": (f"NOTE={text}",)})
    script = batch_script(Job(job.settings.model_copy(update={"launch": launch}), job.words, tmp_path, job.checkout))
    told = subprocess.run(
        ["bash", "-c", re.sub(r"^exec(.|\n)*", 'printf %s "$NOTE"', script, flags=re.M)], cwd=tmp_path, capture_output=True
    )
    assert told.stdout.decode() == text and not list(tmp_path.rglob("hostile"))


def test_the_script_is_clean_by_shellcheck(tmp_path: Path) -> None:
    job = job_of(tmp_path, "launch.modules=[cuda/13.0]", "launch.environment=[A=b c]", sweep=(("run.seed=1",), ("run.seed=2",)))
    (tmp_path / "script").write_text(batch_script(job))
    answer = subprocess.run(["shellcheck", "--exclude=SC1091", tmp_path / "script"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_a_sweep_has_a_run_a_line(tmp_path: Path) -> None:
    settings, words = settings_of(tmp_path), (str(recipe(tmp_path)), *CLUSTER, "run.steps=7")
    runs = sweep_of(
        "# rates\noptimizer.lr=1e-5\n\n'objective.options={clip_low: 0.1}' run.directory=mine # own\n", words, settings
    )
    assert runs == (
        ("optimizer.lr=1e-5", "run.directory=runs/tiny/000"),
        ("objective.options={clip_low: 0.1}", "run.directory=mine"),
    )
    script = batch_script(job_of(tmp_path, "launch.at_once=1", sweep=runs))
    assert asked(script)["array"] == "0-1%1" and "slurm-%A_%a.log" in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr=1e-5 run.directory=a\nrun.directory=a", "line 2 of the sweep has the run.directory of line 1"),
        ("optimizer.lr", "line 1 of the sweep: optimizer.lr is neither an override"),
        ("optimizer.lr='1", "line 1 of the sweep: No closing quotation"),
        ("optimizer.rl=1", "unknown setting optimizer.rl"),
        ("# nothing\n", "the sweep has no line"),
        ("run.seed=1\ncluster.nodes=4", "line 2 of the sweep changes cluster.nodes: a job array has the same machines"),
        ("launch.partition=big sglang.tp_size=2", "changes launch.partition, the servers of a machine"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        sweep_of(text, (str(recipe(tmp_path)), *CLUSTER), settings_of(tmp_path))

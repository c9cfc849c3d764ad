"""`megatron-rl launch`: what it prints, refuses and teaches."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from megatron_rl.cli import app
from megatron_rl.config.load import load_settings
from megatron_rl.config.rules.launching import OWN, Part, Way, _seconds, launch_problems, machines, signal_seconds
from tests.launch.jobs import CLUSTER, recipe


def launched(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["launch", str(recipe(folder)), *CLUSTER, *words])


@pytest.mark.parametrize("way", ["--slurm", "--torchrun", "--kubernetes"])
def test_a_dry_run_is_the_script_and_nothing_else(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed can be given to a file as it is, and is what -o writes."""
    monkeypatch.chdir(tmp_path)
    apart = ["servers.urls_file=urls", "servers.api_key_file=key"]
    pods = [f"launch.claim_path={tmp_path}", "launch.claim=disk", "launch.key_secret=key", "launch.container=image"]
    words = [*apart, *(pods if way == "--kubernetes" else []), way]
    result = launched(tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert "--auto-resume" in result.stdout or result.stdout.startswith("#!/usr/bin/env bash\n")
    assert launched(tmp_path, *words, "-o", "file").exit_code == 0
    assert (tmp_path / "file").read_text() == result.stdout
    if way == "--kubernetes":
        assert yaml.safe_load(result.stdout)["kind"] == "JobSet"
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_ranks_whose_servers_are_elsewhere_start_none(tmp_path: Path) -> None:
    """servers.count then speaks of the servers' machines."""
    words = ["servers.urls_file=urls", "servers.count=4", "--torchrun"]
    assert launched(tmp_path, *words).stdout.endswith(" servers.count=4 servers.count=0\n")
    assert "--servers 4 " in launched(tmp_path, *words, "--part", "servers").stdout


def test_several_settings_files_are_passed_on_as_given(tmp_path: Path) -> None:
    (tmp_path / "machines.yaml").write_text("cluster: {nodes: 3}\nlaunch: {time: '1:00:00'}\n")
    result = launched(tmp_path, str(tmp_path / "machines.yaml"), "run.steps=9", "--slurm")
    assert result.exit_code == 0, result.output
    assert "#SBATCH --nodes=4" in result.stdout and "#SBATCH --time=1:00:00" in result.stdout
    assert result.stdout.rstrip().endswith(f"{tmp_path}/machines.yaml run.steps=9")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give one of --slurm, --torchrun and --kubernetes"),
        (["--slurm", "--torchrun"], "Give one of"),
        (["--torchrun", "--submit"], "--submit is for --slurm"),
        (["--kubernetes", "--submit"], "kubectl create -f FILE"),
        (["--kubernetes", "--sweep", "x"], "--sweep makes a job array of SLURM's"),
        (["--slurm", "--submit"], "sbatch is not on this machine's PATH"),
        (["--slurm", "--sweep", "nowhere"], "--sweep nowhere: it cannot be read"),
        (["--torchrun", "supervised.batch=8", "rewards=[]"], "Start `megatron-rl sft` with them by srun or torchrun"),
        (["--slurm", "layout.expert=3"], "layout.expert = 3"),  # what a dry run finds
        (["--slurm", "rewards=[{name: numerik}]"], "rewards[0].name = numerik"),
        (["--slurm", "layout.world_size=6"], "these machines take 8 ranks"),
        (["--slurm", "-o", "nowhere/script"], "nowhere/script cannot be written: No such file"),
        (["--slurm", "servers.urls_file=urls", "--part", "train", "--sweep", "two"], "to the same servers"),
        (["--slurm", "cluster.server_nodes=0", "servers.urls=[http://n:1]", "--sweep", "two"], "to the same servers"),
        (["--slurm", "servers.urls_file=urls", "--part", "servers", "--sweep", "two"], "these are servers, and no runs"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").write_text("run.seed=1\nrun.seed=2\n")
    result = launched(tmp_path, *words)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stdout == "" and all(line.startswith(("error: ", "warning: ")) for line in result.stderr.splitlines())


def test_what_nodes_would_miss_is_missed_before_it_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho submitted > called\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.chdir(tmp_path)
    result = launched(tmp_path, "launch.container=./no.sif", "launch.checkout=/no", "launch.venv=/none", "--slurm", "--submit")
    assert result.exit_code == 2
    assert [line.split(":")[1] for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        " launch.checkout",
        " launch.venv",
        " launch.container",
    ]
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("words", [["--slurm"], ["--slurm", "--sweep", "two"], ["--slurm", "--submit"]], ids=" ".join)
def test_a_run_without_weights_is_told_so_once(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of configs/ names a model's shape alone."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").write_text("run.seed=1\nrun.seed=2\n")
    given = [*words, f"launch.container={tmp_path}/sbatch"]
    result = launched(tmp_path, *given)
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: policy.init = random: ") and "Set policy.init to the folder of its checkpoint" in line
    (tmp_path / "model.safetensors").touch()
    assert launched(tmp_path, *given, f"policy.init={tmp_path}").stderr == ""


SECRET_NAMES = ("HF_TOKEN", "WANDB_API_KEY", "wandb_apikey", "DB_PASSWORD", "HF_AUTH", "AWS_SECRET_ACCESS_KEY", "KEYS")


def test_a_sweep_may_share_servers_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").write_text("run.seed=1\nrun.seed=2\n")
    words = ["--slurm", "servers.urls_file=urls", "--part", "train", "--sweep", "two"]
    assert launched(tmp_path, *words, "launch.at_once=1").exit_code == 0
    assert launched(tmp_path, "--slurm", "servers.urls_file=urls", "--sweep", "two").exit_code == 0  # each job its own


@pytest.mark.parametrize("name", ['a"b', "50%", "a\nb", "a\\b"])
def test_slurm_is_not_launched_from_folders_that_it_misreads(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    result = launched(tmp_path, "--slurm")
    assert result.exit_code == 2 and result.stdout == "" and "the folder in which you launch = " in result.stderr
    assert launched(tmp_path, "--torchrun", "cluster.server_nodes=0").exit_code == 0


ALONE = "cluster.server_nodes=0"
COLOCATED = f"{ALONE} servers.placement=colocated publish.folder=shared"
APART = "servers.urls_file=urls servers.api_key_file=key"
WRONG: list[tuple[str, Way, Part, str]] = [
    ("cluster.nodes=null", "slurm", "all", "cluster.nodes is not set, nor is layout.world_size"),
    ("cluster.nodes=null layout.world_size=6", "slurm", "all", "Set layout.world_size to 4 or 8"),
    (f"{COLOCATED} servers.count=0", "slurm", "all", "no server would be started on the GPUs of the ranks"),
    ("sglang.tp_size=8", "slurm", "all", "a server lives on one machine"),
    ("sglang.tp_size=2 servers.count=3", "slurm", "all", "Set servers.count to at most 2"),
    (f"{ALONE} launch.gres=gpu:4", "slurm", "all", "on GPUs that the ranks use"),
    (f"{COLOCATED} cluster.server_nodes=2", "slurm", "all", "cluster.server_nodes = 2 with servers.placement = colocated"),
    (f"{COLOCATED} servers.urls_file=urls", "slurm", "train", "--part train with servers.placement = colocated"),
    (f"{COLOCATED} publish.folder=null", "slurm", "all", "without publish.folder"),
    (COLOCATED, "torchrun", "all", "a run starts servers on its first machine alone"),
    (f"{ALONE} {APART}", "slurm", "servers", "there is no machine for servers"),
    ("servers.api_key_file=key", "slurm", "train", "servers.urls_file is not set"),
    ("", "torchrun", "all", "servers.urls_file is not set"),
    ("launch.time=5:00", "slurm", "all", "told to stop as soon as it begins"),
    ("launch.signal_seconds=100", "slurm", "all", "Set launch.signal_seconds to 360"),
    ("launch.mounts=[/a:/b]", "slurm", "all", "launch.mounts without launch.container"),
    ("launch.container=c launch.mounts=[a]", "slurm", "all", "launch.mounts[0] = a: this is no mount"),
    ("launch.claim=c launch.key_secret=k", "kubernetes", "all", "launch.container is not set: pods need"),
    ("launch.container=c launch.key_secret=k", "kubernetes", "all", "launch.claim is not set"),
    ("launch.container=c launch.claim=c", "kubernetes", "all", "launch.key_secret is not set"),
    ("launch.container=c launch.claim=c launch.key_secret=k", "kubernetes", "all", "pods see the volume claim"),
    ("launch.partition='a b'", "slurm", "all", "launch.partition = 'a b': this is no name"),
    ('launch.time="1:00\\n#SBATCH --uid=0"', "slurm", "all", "launch.time = "),
    ("launch.modules=[-x]", "slurm", "all", "launch.modules[0]"),
    ("launch.sbatch=['--wrap=x y']", "slurm", "all", "this is no option in one word"),
    ("launch.sbatch=[reboot]", "slurm", "all", "this is no option in one word"),
    ("launch.environment=[1A=2]", "slurm", "all", "launch.environment[0]: this is no variable"),
    *((f"launch.environment=[{name}=abc]", "slurm", "all", "this sounds like a secret") for name in SECRET_NAMES),
    ('launch.logs="a\\nb"', "slurm", "all", "launch.logs = "),
    ("launch.logs=50%", "slurm", "all", "launch.logs = '50%'"),
    *((f"launch.sbatch=[--{name}=1]", "slurm", "all", f"Set {instead} instead") for name, instead in OWN.items()),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "way", "part", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_told_with_a_fix(tmp_path: Path, overrides: str, way: Way, part: Part, message: str) -> None:
    words = overrides.split(" ") if "'" not in overrides and '"' not in overrides else [overrides]
    found = list(launch_problems(load_settings(recipe(tmp_path), [*CLUSTER, *filter(None, words)]), way, part))
    assert any(message in line for line in found), found
    assert "abc" not in str(found)  # what may be a secret is not repeated


@pytest.mark.parametrize(
    ("overrides", "way", "part"),
    [
        ("", "slurm", "all"), (APART, "slurm", "servers"), (APART, "slurm", "train"),
        (APART, "torchrun", "all"), ("servers.urls_file=urls", "slurm", "servers"),
        (COLOCATED, "slurm", "all"), (ALONE, "slurm", "all"), (f"{ALONE} servers.urls=[http://n:1]", "torchrun", "all"),
        ("launch.container=nvcr.io#nvidia/pytorch launch.mounts=[/a:/b:ro] launch.gres=gpu:h100:4", "slurm", "all"),
        ("launch.sbatch=[--constraint=h100,--mail-type=END]", "slurm", "all"),
        ("launch.environment=[TOKENIZERS_PARALLELISM=false,NCCL_IB_HCA=mlx5]", "slurm", "all"),
        ("servers.count=0", "slurm", "all"),  # of a run that starts none by itself: the job starts what the GPUs hold
    ],
)  # fmt: skip
def test_what_can_work_is_left_alone(tmp_path: Path, overrides: str, way: Way, part: Part) -> None:
    settings = load_settings(recipe(tmp_path), [*CLUSTER, *overrides.split()])
    assert list(launch_problems(settings, way, part)) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("cluster.nodes=3", (3, 8)), ("cluster.nodes=3 cluster.gpus_per_node=1", (3, 1)), ("layout.world_size=32", (4, 8)),
        ("layout.world_size=2", (1, 2)), ("layout.world_size=12", None), ("", None),
    ],
)  # fmt: skip
def test_machines_follow_from_the_settings(tmp_path: Path, overrides: str, expected: tuple[int, int] | None) -> None:
    settings = load_settings(recipe(tmp_path), overrides.split())
    assert machines(settings) == expected
    assert signal_seconds(settings) >= settings.checkpoint.grace_seconds


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400), ("5:30", 330), ("24:00:00", 86400), ("7-00", 604800), ("1-2:03", 93780), ("1-2:03:04", 93784),
        ("UNLIMITED", None), ("infinite", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int | None) -> None:
    assert _seconds(time) == seconds


def test_auto_resume_continues_where_a_run_is(tmp_path: Path) -> None:
    """With the run's settings and these overrides; the files were read when it began."""
    run = tmp_path / "run"
    words = ["train", str(recipe(tmp_path)), f"run.directory={run}", "run.steps=7", "--auto-resume", "--dry-run"]
    assert "lr = " not in CliRunner().invoke(app, words).stdout
    run.mkdir()
    (run / "settings.yaml").write_text(f"policy: {{config: {tmp_path}/config.json}}\noptimizer: {{lr: 0.5}}\n")
    resumed = CliRunner().invoke(app, words)
    assert resumed.exit_code == 0, resumed.output
    assert "lr = 0.5" in resumed.stdout and "steps = 7" in resumed.stdout
    refused = CliRunner().invoke(app, ["train", "--resume", str(run), "--auto-resume"])
    assert refused.exit_code == 2 and "Give either it or --resume" in refused.stderr

"""The JobSet: its structure, its numbers, and that Kubernetes replaces nothing in what the settings hold."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.config.errors import SettingsError
from megatron_rl.launch.job import Job
from megatron_rl.launch.kubernetes import manifest
from tests.launch.jobs import settings_of

POD = ["launch.container=registry/image:1", "launch.claim=disk", "launch.key_secret=key", "cluster.gpu=h100"]


def jobset(folder: Path, *overrides: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    settings = settings_of(folder, *POD, f"launch.claim_path={folder}", *overrides)
    found: dict[str, Any] = yaml.safe_load(manifest(Job(settings, ("tiny.yaml", *words), folder, folder / "unused")))
    return found


def parts(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["name"]: part["template"]["spec"] for part in document["spec"]["replicatedJobs"]}


def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["template"]["spec"]["containers"]
    return dict(found)


def test_machines_that_train_and_serve(tmp_path: Path) -> None:
    document = jobset(tmp_path, "launch.requeue=7", "checkpoint.grace_seconds=60")
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = document["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    assert document["spec"]["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["train"]}
    jobs = parts(document)
    assert {name: (job["parallelism"], job["completions"]) for name, job in jobs.items()} == {
        "train": (2, 2),
        "servers": (1, 1),
    }
    for name, job in jobs.items():
        pod = job["template"]["spec"]
        assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
        assert pod["terminationGracePeriodSeconds"] == 120
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {"containerName": name, "operator": "In", "values": [2]}
        assert {mount["name"] for mount in container(job)["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        secrets = [volume["secret"]["defaultMode"] for volume in pod["volumes"] if "secret" in volume]
        assert [mode & 0o004 for mode in secrets] == [0o004]  # files of a secret are root's, and the image's user is not root
        assert container(job)["resources"] == {"limits": {"nvidia.com/gpu": 4}}
        # every variable that arguments name is declared, or is Kubernetes' own of an indexed job
        declared = {variable["name"] for variable in container(job)["env"]} | {"JOB_COMPLETION_INDEX"}
        named = {piece.partition(")")[0] for word in container(job)["command"] for piece in word.split("$(")[1:]}
        assert named and named <= declared


@pytest.mark.parametrize("name", ["1st", "a" * 60])
def test_a_name_that_hosts_cannot_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=r"is no name for Kubernetes. Set launch.name to .* 51 letters"):
        jobset(tmp_path, f"launch.name={name}")


def test_ranks_find_each_other_and_their_servers(tmp_path: Path) -> None:
    document = jobset(tmp_path)
    jobs = parts(document)
    ranks, servers = container(jobs["train"]), container(jobs["servers"])
    (address,) = (variable["value"] for variable in ranks["env"] if variable["name"] == "MASTER_ADDR")
    assert address == "tiny-train-0-0.tiny" and document["spec"]["network"]["subdomain"] == "tiny"
    assert {"--nnodes=2", "--nproc-per-node=4", "--node-rank=$(JOB_COMPLETION_INDEX)", "--auto-resume"} <= set(ranks["command"])
    (urls,) = (word.partition("=")[2] for word in ranks["command"] if word.startswith("servers.urls_file="))
    assert servers["command"][servers["command"].index("--urls") + 1] == urls
    assert "servers.host=$(POD_IP)" in servers["command"]


def test_a_run_without_servers_of_its_own_has_none(tmp_path: Path) -> None:
    document = jobset(tmp_path, "cluster.server_nodes=0", "servers.urls_file=urls")
    assert set(parts(document)) == {"train"} and "secret" not in str(document)


def test_nothing_of_the_settings_is_replaced(tmp_path: Path) -> None:
    words = ("rewards=[{name: $(POD_IP)}]", "a$$(b)", "line\nbreak", "- x: {y")
    found = parts(jobset(tmp_path, "launch.environment=['A=$(POD_IP)']", words=words))
    for job in found.values():
        command = container(job)["command"]
        escaped = [word.replace("$$", "$") for word in command if word.replace("$$", "$") in words]
        assert escaped == list(words)
        assert "rewards=[{name: $$(POD_IP)}]" in command
        assert {"name": "A", "value": "$$(POD_IP)"} in container(job)["env"]

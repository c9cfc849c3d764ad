"""A JobSet for Kubernetes: the machines that train as one indexed job, those that serve as another, restarted together.

No shell is involved: pods run the programs themselves. `$(NAME)` in their arguments is Kubernetes' own, which puts a
variable's value there; in what comes from the settings it is written so that nothing is replaced.
"""

from typing import Any

import yaml

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.rules.launching import signal_seconds
from megatron_rl.launch.job import Job

KEY_FOLDER = "/etc/megatron-rl"
RENDEZVOUS_PORT, SERVER_PORT = 29500, 30000
NAME_LENGTH = 63  # of a host's name
# A pod that ended with 2 has something to be mended, which would be the same again: its job fails by podFailurePolicy.
MEND = {"name": "mend", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
ATTEMPT = "jobset.sigs.k8s.io/restart-attempt"  # the label by which a pod knows how often the whole was started again


def manifest(job: Job) -> str:
    """YAML for `kubectl create -f`. The JobSet controller has to be installed in the cluster."""
    longest = f"{job.name}-servers-0-{max(job.nodes, job.server_nodes)}"  # as pods are called
    if not job.name[0].isalpha() or len(longest) > NAME_LENGTH:
        raise SettingsError(
            f"launch.name: {job.name} is no name for Kubernetes. Set launch.name to a word that begins with a letter and has "
            f"{NAME_LENGTH - len(longest) + len(job.name)} letters at most."
        )
    parts = []
    if job.nodes:
        parts.append(_part(job, "train", job.nodes, _ranks(job)))
    if job.server_nodes:
        parts.append(_part(job, "servers", job.server_nodes, _servers(job)))
    over = {"successPolicy": {"operator": "All", "targetReplicatedJobs": ["train"]}} if job.nodes else {}
    document = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            **over,
            "failurePolicy": {"maxRestarts": job.settings.launch.requeue, "rules": [MEND]},
            "replicatedJobs": parts,
        },
    }
    return yaml.safe_dump(document, sort_keys=False, width=120)


def _part(job: Job, name: str, pods: int, words: list[str]) -> dict[str, Any]:
    """One pod a machine, numbered by Kubernetes. A pod that ends badly ends the part, and so the attempt."""
    settings = job.settings
    given = dict(each.split("=", 1) for each in settings.launch.environment)
    known = {"MASTER_ADDR": f"{job.name}-train-0-0.{job.name}"} if name == "train" else {}
    found = {"POD_IP": "status.podIP", "ATTEMPT": f"metadata.labels['{ATTEMPT}']"}
    container: dict[str, Any] = {
        "name": name,
        "image": settings.launch.container,
        "command": words,
        "workingDir": str(job.folder),
        "env": [
            *({"name": each, "value": _literal(value)} for each, value in {**given, **known}.items()),
            *({"name": each, "valueFrom": {"fieldRef": {"fieldPath": path}}} for each, path in found.items()),
        ],
        "volumeMounts": [
            {"name": "shared", "mountPath": str(settings.launch.claim_path)},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    if settings.launch.gres is not None or settings.cluster.gpu is not None:
        container["resources"] = {"limits": {"nvidia.com/gpu": settings.cluster.gpus_per_node}}
    volumes: list[dict[str, Any]] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": settings.launch.claim}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
    if job.server_nodes:
        container["volumeMounts"].append({"name": "key", "mountPath": KEY_FOLDER, "readOnly": True})
        # Files of a secret are root's, and the image runs as somebody else; but for that there is nobody in the pod.
        volumes.append({"name": "key", "secret": {"secretName": settings.launch.key_secret, "defaultMode": 0o444}})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": signal_seconds(settings),
        "containers": [container],
        "volumes": volumes,
    }
    mend = {"action": "FailJob", "onExitCodes": {"containerName": name, "operator": "In", "values": [2]}}
    return {
        "name": name,
        "replicas": 1,
        "template": {
            "spec": {
                "parallelism": pods,
                "completions": pods,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "podFailurePolicy": {"rules": [mend]},
                "template": {"spec": pod},
            }
        },
    }


def _ranks(job: Job) -> list[str]:
    options = [f"--nnodes={job.nodes}", f"--nproc-per-node={job.ranks_per_node}"]
    options += ["--node-rank=$(JOB_COMPLETION_INDEX)", "--master-addr=$(MASTER_ADDR)", f"--master-port={RENDEZVOUS_PORT}"]
    found = ["servers.count=0", _urls(job), f"servers.api_key_file={KEY_FOLDER}/key"] if job.server_nodes else []
    program = [job.python, "-m", "megatron_rl.train.elastic", *options, "-m", "megatron_rl.cli", "train"]
    return [*program, *map(_literal, job.asked), *found, "--auto-resume"]


def _servers(job: Job) -> list[str]:
    where = ["servers.host=$(POD_IP)", f"servers.port={SERVER_PORT}", f"servers.api_key_file={KEY_FOLDER}/key"]
    logs = f"servers.logs={_literal(str(job.logs))}/servers-$(JOB_COMPLETION_INDEX)-$(ATTEMPT)"
    how = ["--servers", str(job.servers_per_node), "--urls", _urls(job).partition("=")[2]]
    return [job.python, "-m", "megatron_rl.cli", "serve", *map(_literal, job.words), *where, logs, *how]


def _urls(job: Job) -> str:
    """A file for each attempt: what pods of the one before could not take out of theirs misleads nobody."""
    return f"servers.urls_file={_literal(str(job.logs))}/urls-$(ATTEMPT)"


def _literal(text: str) -> str:
    """Kubernetes takes `$$` for a dollar sign, and replaces nothing behind it."""
    return text.replace("$", "$$")

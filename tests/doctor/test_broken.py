"""Environments that are broken in one way each: the doctor names that one, says what to do, and ends with the right code."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from megatron_rl.rollout.server import free_ports
from tests.doctor.environments import (
    Told,
    all_but,
    distribution,
    doctor,
    environment,
    few_files,
    here,
    obey_permissions,
    program,
    small_files,
)
from tests.reference.tiny import write_tiny_config

H100 = """
asked = " ".join(sys.argv[1:])
if "query-gpu" in asked:
    for i in range(2):
        print(f"{i}, GPU-{i}, NVIDIA H100 80GB HBM3, 81559, {FULL if i else 0}, {DRIVER}, {FAULTS if i else 0}")
elif "compute-apps" in asked:
    print(APPS, end="")
elif "topo" in asked:
    print("\\t\\x1b[4mGPU0\\tGPU1\\tCPU Affinity\\x1b[0m")
    print(f"GPU0\\t X \\t{LINK}\\t0-63\\nGPU1\\t{LINK}\\t X \\t0-63\\nLegend:")
else:
    print("| NVIDIA-SMI 535.1   Driver Version: 535.1   CUDA Version: 12.2 |")
"""
WELL = {"FULL": 0, "DRIVER": "535.1", "FAULTS": 0, "APPS": "", "LINK": "NV18"}


def with_gpus(folder: Path, *first: Path, **other: object) -> dict[str, str]:
    """Two GPUs, as far as nvidia-smi tells."""
    values = "".join(f"{name} = {value!r}\n" for name, value in {**WELL, **other}.items())
    path = program(folder / "bin", "nvidia-smi", values + H100)
    own = environment(*first, PATH=f"{path}:/usr/bin:/bin")
    del own["CUDA_VISIBLE_DEVICES"]
    return own


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[list[str]]:
    """Overrides that make settings of a tiny model."""
    yield [
        f"policy.config={write_tiny_config('qwen3_moe', tmp_path)}",
        "precision.dtype=float32",
        f"run.directory={tmp_path / 'run'}",
    ]


def finds(told: Told, check: str, level: str, text: str, fix: str = "") -> None:
    """This finding, with a fix; the exit code follows from the levels; every error has its check among those that were made."""
    found = [line for line in told.of(check, level) if text in line["what"]]
    assert found, told.verdict["findings"]
    assert fix in found[0]["fix"] and found[0]["fix"]
    assert told.code == int(told.verdict["counts"]["error"] > 0)
    assert told.verdict["verdict"] == max(
        (line["level"] for line in told.verdict["findings"]), key=["ok", "warning", "error"].index
    )


# -- packages --------------------------------------------------------------------------------------------------------------


def test_wrong_torch_and_wrong_megatron(tmp_path: Path) -> None:
    """Hidden copies behind them are named; of everything else nothing is said."""
    wrong = distribution(distribution(tmp_path, "torch", "2.9.1"), "megatron-core", "0.18.0")
    told = doctor("+versions", env=environment(wrong))
    finds(told, "versions", "error", "torch is 2.9.1, wanted is ==2.11.0", "torch==2.11.0")
    finds(told, "versions", "error", "megatron-core is 0.18.0, wanted is ==0.19.2")
    finds(told, "versions", "warning", "torch is installed more than once")
    assert told.verdict["counts"] == {"ok": 0, "warning": 2, "error": 2}


def test_missing_sglang(tmp_path: Path) -> None:
    told = doctor("+versions", env=environment(all_but(tmp_path / "site", "sglang")), options=["-S"])
    finds(told, "versions", "error", "sglang is not installed, wanted is ==0.5.17", "launch/setup.sh")
    assert told.verdict["counts"]["error"] == 1


def test_apex_that_is_not_nvidias_and_torch_that_kills(tmp_path: Path) -> None:
    """The process that loads torch dies of it; the doctor does not."""
    site = distribution(tmp_path, "apex", "0.9.10.dev0", apex="raise SystemExit('a toolkit for Pyramid')")
    distribution(site, "torch", "2.11.0", torch="import os\nos.abort()")
    told = doctor("+libraries", "+limits", env=environment(site))
    finds(told, "libraries", "error", "apex (0.9.10.dev0) is not NVIDIA's", "pip uninstall apex")
    finds(told, "libraries", "error", "torch does not load: it was killed by SIGABRT")
    assert str(site / "torch") in told.of("libraries", "error")[0]["where"]
    assert told.of("limits", "ok"), "the other checks go on"


def test_torch_that_hangs_is_given_up(tmp_path: Path) -> None:
    site = distribution(tmp_path, "torch", "2.11.0", torch="import time\ntime.sleep(1000)")
    told = doctor("+libraries", "--limit", "1", env=environment(site))
    finds(told, "libraries", "error", "torch does not load: it was not done after 1 s")


def test_torch_for_another_machine(tmp_path: Path) -> None:
    """Built without CUDA where GPUs are, and of two versions at once; NVIDIA's apex without what is compiled."""
    cpu = "class version:\n    cuda = None\nclass cuda:\n    device_count = staticmethod(lambda: 0)\n__version__ = '2.8.0+cpu'"
    site = distribution(
        tmp_path / "site", "torch", "2.11.0", torch=cpu, **{"apex/normalization": "", "apex/multi_tensor_apply": ""}
    )
    (site / "apex/__init__.py").write_text("")
    told = doctor("+libraries", env=with_gpus(tmp_path, site))
    finds(told, "libraries", "error", "torch is built without CUDA, and there are GPUs", "--gpu")
    finds(told, "libraries", "error", "torch calls itself 2.8.0+cpu, and the metadata of its package 2.11.0")
    finds(told, "libraries", "error", "transformer-engine is not installed, and there are GPUs")
    finds(told, "libraries", "warning", "NVIDIA apex is installed without its compiled parts")
    assert not told.says("libraries", "error", "is not NVIDIA's")


# -- the machine -----------------------------------------------------------------------------------------------------------


def test_gpus_that_others_use_and_far_apart(tmp_path: Path, settings: list[str]) -> None:
    env = with_gpus(tmp_path, APPS="4711, 20000, python\n", FAULTS=3, LINK="SYS")
    wanted = ["layout.tensor=2", "layout.world_size=4", "cluster.gpus_per_node=4"]
    told = doctor("+gpus", *settings, *wanted, env=env)
    finds(told, "gpus", "warning", "1 programs use GPUs here: 4711, 20000, python", "exclusive")
    finds(told, "gpus", "error", "GPU 1 has had 3 memory errors")
    finds(told, "gpus", "error", "4 ranks are wanted on this machine, and it has 2 GPUs")
    finds(told, "gpus", "warning", "connected through the processor (SYS)", "layout.tensor")
    assert told.says("gpus", "ok", "2 × NVIDIA H100 80GB HBM3 of 80 GiB, driver 535.1")


def test_a_driver_that_is_gone(tmp_path: Path) -> None:
    path = program(
        tmp_path / "bin", "nvidia-smi", "print('Failed to initialize NVML: Driver/library version mismatch')\nsys.exit(18)"
    )
    told = doctor("+gpus", env=environment(PATH=f"{path}:/usr/bin:/bin"))
    finds(told, "gpus", "error", "nvidia-smi ended with code 18 and said: Failed to initialize NVML")


def test_too_few_open_files_and_no_such_interface() -> None:
    env = environment(GLOO_SOCKET_IFNAME="ib17")
    told = doctor("+limits", "+network", env=env, before=few_files)
    finds(told, "limits", "error", "256 files may be open", "ulimit -n")
    finds(told, "network", "error", "GLOO_SOCKET_IFNAME names ib17")


def test_ports_that_are_taken(settings: list[str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASTER_PORT", str(port))
            finds(here("+ports"), "ports", "error", f"port {port} (MASTER_PORT) is taken", "ss -ltnp")
        told = here("+ports", *settings, f"servers.port={port}", "servers.count=1")
        finds(told, "ports", "error", f"port {port} (servers.port) is taken", "ss -ltnp")
        finds(told, "ports", "warning", "is one of those that the system gives to any program")
    told = here("+ports", *settings, f"servers.port={port}", "servers.count=1")
    assert told.says("ports", "ok", f"port {port} (servers.port) is free") and told.code == 0


# -- the run's folder ------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path: Path, settings: list[str]) -> None:
    tmp_path.joinpath("closed").mkdir(mode=0o555)
    told = doctor("+folder", "+locks", "+clock", *settings, f"run.directory={tmp_path}/closed/run", before=obey_permissions)
    finds(told, "folder", "error", f"{tmp_path}/closed cannot be written to: Permission denied", "run.directory")
    assert told.of("locks", "error") and told.of("clock", "error")


def test_a_file_in_the_way(tmp_path: Path, settings: list[str]) -> None:
    tmp_path.joinpath("run").write_text("")
    told = here("+folder", *settings)
    finds(told, "folder", "error", "run cannot be made", "Remove the file")


def test_a_disk_that_takes_no_more(tmp_path: Path, settings: list[str]) -> None:
    """And one that is too small for the checkpoints of such a model; nothing is left behind on either."""
    told = doctor("+folder", *settings, before=small_files)
    finds(told, "folder", "error", "cannot be written to: File too large", "quota")
    kept = "checkpoint.keep_last=1000000000"
    finds(here("+folder", *settings, kept), "folder", "warning", "1000000001 checkpoints take", "keep_last")
    assert [path.name for path in tmp_path.iterdir() if path.name != "config.json"] == []


# -- settings and servers --------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    """The machine is looked at all the same."""
    path = tmp_path / "recipe.yaml"
    path.write_text("policy: {config: nowhere}\nlayuot: {tensor: 2}\n")
    told = here(str(path), "+settings", "+limits")
    finds(told, "settings", "error", "unknown setting layuot.tensor. Did you mean layout.tensor?")
    assert told.of("limits", "ok") and told.code == 1


def test_settings_that_do_not_fit_and_servers_that_are_dead(settings: list[str]) -> None:
    (port,) = free_ports(1)
    urls = f"servers.urls=[http://127.0.0.1:{port}]"
    told = here("+settings", "+servers", *settings, "layout.tensor=3", urls)
    finds(told, "settings", "error", "layout.tensor")
    finds(told, "servers", "error", f"127.0.0.1:{port}", "megatron-rl serve")
    assert told.of("servers", "error")[0]["where"] == f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("text", "nodes", "level", "what"),
    [
        (None, 0, "error", "the file of URLs names no server"),
        ("# none\n", 2, "ok", "no server yet: they are started with the run, on 2 machines"),
        ("node7:30000\n", 2, "error", "the file of URLs cannot be read: 'node7:30000' is no URL of a server"),
    ],
)
def test_a_file_of_urls_that_names_nobody(
    settings: list[str], tmp_path: Path, text: str | None, nodes: int, level: str, what: str
) -> None:
    if text is not None:
        (tmp_path / "urls").write_text(text)
    told = here("+servers", *settings, f"servers.urls_file={tmp_path}/urls", f"cluster.server_nodes={nodes}")
    assert told.says("servers", level, what) and told.code == int(level == "error"), told.verdict["findings"]

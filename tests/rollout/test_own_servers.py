"""From settings to the servers that are started: how many, of which model, on which GPUs; and the URL file."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.rollout.own_servers import own_servers, require_ranks, served_model
from megatron_rl.rollout.server import Server, ServerOptions, ServerStartError
from megatron_rl.rollout.serving import serve
from megatron_rl.rollout.urls_file import announced, read_urls


def settings(*overrides: str) -> Settings:
    return load_settings(None, ["policy.init=/models/base", "device.kind=cpu", *overrides])


def on_gpus(monkeypatch: pytest.MonkeyPatch, visible: str, *overrides: str) -> list[Sequence[int | str] | None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return [options.gpus for options in own_servers(settings("device.kind=cuda", *overrides))]


def test_one_server_where_nobody_else_serves() -> None:
    (options,) = own_servers(settings())
    assert (options.model, options.on_cpu, options.arguments) == ("/models/base", True, {})
    assert options.log == Path("runs/default/servers/server-0.log")
    assert own_servers(settings("servers.urls=[http://a:1]")) == []
    assert own_servers(settings("servers.urls_file=urls")) == []
    assert len(own_servers(settings("servers.urls=[http://a:1]", "servers.count=2"))) == 2


def test_several_servers_share_nothing() -> None:
    several = own_servers(settings("servers.count=3", "servers.port=4000", "servers.logs=/logs", "device.threads=5"))
    assert [options.port for options in several] == [4000, 4001, 4002]
    assert [options.log.name for options in several] == ["server-0.log", "server-1.log", "server-2.log"]
    assert {options.threads for options in several} == {5}


@pytest.mark.parametrize(
    ("overrides", "model", "arguments"),
    [
        (["servers.model=org/name"], "org/name", {}),
        (["sglang.tp_size=2"], "/models/base", {"tp_size": 2}),
        (["sampling.routing=true"], "/models/base", {"enable_return_routed_experts": True}),
        (["objective.routing_replay=rollout"], "/models/base", {"enable_return_routed_experts": True}),
        (["objective.routing_replay=policy"], "/models/base", {}),
        (["policy.init=random", "policy.config=/models/x/config.json"], "/models/x", {"load_format": "dummy"}),
        (["policy.init=random", "policy.config=/models/x"], "/models/x", {"load_format": "dummy"}),
        (["policy.init=random", "policy.config=/models/x", "servers.model=m"], "m", {}),
        (["policy.init=random", "policy.config=/m", "sglang.load_format=auto"], "/m", {"load_format": "auto"}),
    ],
)
def test_which_model(overrides: list[str], model: str, arguments: dict[str, Any]) -> None:
    (options,) = own_servers(settings(*overrides))
    assert (options.model, options.arguments) == (model, arguments)


def test_gpus_are_dealt_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    two_by_two = ["servers.count=2", "sglang.tp_size=2"]
    assert on_gpus(monkeypatch, "0,1,2,3", *two_by_two) == [("0", "1"), ("2", "3")]
    assert on_gpus(monkeypatch, "4,5,GPU-a,7", *two_by_two) == [("4", "5"), ("GPU-a", "7")]
    assert on_gpus(monkeypatch, "0", *two_by_two, "servers.gpus=[3,2,1,0]") == [(3, 2), (1, 0)]
    assert on_gpus(monkeypatch, "0,1,2,3", "sglang.tensor_parallel_size=2", "sglang.pp-size=2") == [("0", "1", "2", "3")]


def test_the_trainers_gpus_get_as_many_servers_as_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_gpus(monkeypatch, "4,5,6,7", "servers.placement=colocated", "sglang.tp_size=2") == [("4", "5"), ("6", "7")]
    assert on_gpus(monkeypatch, "4,5,6", "servers.placement=colocated", "servers.gpus=[6]") == [(6,)]
    assert on_gpus(monkeypatch, "4,5,6,7", "servers.placement=colocated", "servers.count=1") == [("4",)]
    assert on_gpus(monkeypatch, "4,5,6,7", "servers.placement=colocated", "servers.urls=[http://a:1]") == []
    assert on_gpus(monkeypatch, "4,5,6,7") == [("4",)]


def test_the_served_folder_is_known_where_no_gpu_is(tmp_path: Path) -> None:
    """Every rank asks, also on machines that have none of the GPUs of `servers.gpus`."""
    (tmp_path / "config.json").write_text("{}")
    names = [f"servers.model={tmp_path}", "device.kind=cuda", "servers.gpus=[99,99]", "servers.count=2"]
    assert served_model(settings(*names)) == tmp_path
    assert served_model(settings(*names, "servers.count=0")) is None
    assert served_model(settings("servers.model=a-name-of-a-hub")) is None


def test_servers_on_the_trainers_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """They can sleep, leave the trainer room, and are known by its ranks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    colocated = ["device.kind=cuda", "servers.placement=colocated", "servers.count=2", "sglang.tp_size=2"]
    first, second = own_servers(settings(*colocated))
    assert (first.gpus, first.ranks, second.gpus, second.ranks) == (("4", "5"), (0, 1), ("6", "7"), (2, 3))
    assert first.arguments == {"enable_memory_saver": True, "mem_fraction_static": 0.5, "tp_size": 2}
    (other,) = own_servers(settings(*colocated[:2], "servers.gpus=[7]", "sglang.mem_fraction_static=0.2"))
    assert (other.ranks, other.arguments["mem_fraction_static"]) == ((3,), 0.2)
    require_ranks([first, second, other], 4)
    with pytest.raises(SettingsError, match="a server uses GPU 6, 7, and none of the 2 ranks here does"):
        require_ranks([first, second], 2)
    with pytest.raises(SettingsError, match=r"GPU 1 is not among those of the trainer .*4,5,6,7"):
        own_servers(settings(*colocated[:2], "servers.gpus=[1]"))
    (apart,) = own_servers(settings("device.kind=cuda", "servers.gpus=[1]"))
    assert (apart.ranks, apart.arguments) == ((), {})
    (on_cpu,) = own_servers(settings("servers.placement=colocated"))
    assert (on_cpu.ranks, on_cpu.arguments) == ((), {})


@pytest.mark.parametrize("overrides", [["servers.count=3"], ["sglang.tp_size=4"], ["servers.count=2", "servers.gpus=[1,1]"]])
def test_gpus_that_there_are_not(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"servers\.count = .*servers\.gpus"):
        on_gpus(monkeypatch, "0,1", *overrides)


def test_urls_of_a_file() -> None:
    assert read_urls("http://a:1/ # first\n\n  https://b:2\nhttp://a:1\n#http://c:3") == {"http://a:1", "https://b:2"}
    with pytest.raises(ValueError, match="a:1"):
        read_urls("a:1")


def test_urls_are_announced_while_they_last_and_those_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "shared" / "urls"
    with announced(path, ["http://a:1"]):
        with announced(path, ["http://b:2/", "http://b:3"]):
            path.write_text(path.read_text() + "http://c:4  # by hand\n")
            assert read_urls(path.read_text()) == {"http://a:1", "http://b:2", "http://b:3", "http://c:4"}
        assert path.read_text() == "http://a:1\nhttp://c:4  # by hand\n"
    assert path.read_text() == "http://c:4  # by hand\n"


def test_many_announce_at_once_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "urls"
    script = (
        "import sys; from pathlib import Path; from megatron_rl.rollout.urls_file import announced\n"
        "for n in range(40):\n"
        "    with announced(Path(sys.argv[1]), [f'http://{sys.argv[2]}:{n + 1}']): pass\n"
        "kept = announced(Path(sys.argv[1]), [f'http://{sys.argv[2]}:99'])\n"
        "kept.__enter__()\n"
        "import os; os._exit(0)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in "abcd"]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert read_urls(path.read_text()) == {f"http://{name}:99" for name in "abcd"}


def test_a_server_that_ends_once_too_often_ends_the_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that were ready, and are no more at the next look."""
    options = ServerOptions(tmp_path / "no-model", tmp_path / "server.log", device="cpu")

    async def started(_: Sequence[ServerOptions]) -> list[Server]:
        server = Server.start(options)
        server.kill()
        return [server]

    monkeypatch.setattr("megatron_rl.rollout.serving.start_servers", started)
    said: list[str] = []
    urls = tmp_path / "urls"
    with pytest.raises(ServerStartError, match=r"ended, and may not be started again \(servers\.restarts = 0\)"):
        asyncio.run(serve([options], urls, 0, lambda servers: said.append(servers[0].url), said.append))
    assert len(said) == 1 and urls.read_text() == ""


def test_own_servers_cost_no_torch() -> None:
    probe = "import sys; import megatron_rl.rollout.own_servers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "False\n"

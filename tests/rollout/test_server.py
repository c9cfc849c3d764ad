"""Servers of our own: what they are started with, and how they fail to start."""

import asyncio
import stat
from pathlib import Path

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.rollout import server as server_module
from megatron_rl.rollout.server import CPU_STUB, ServerOptions, ServerStartError, free_ports, start_servers


def test_a_server_that_dies_at_its_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(ServerStartError, match=r"(?s)ended while it started.*server\.log.*no-model"):
        asyncio.run(start_servers([ServerOptions(tmp_path / "no-model", log, device="cpu")]))
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_only_loopback_without_a_key(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        ServerOptions("m", tmp_path / "log", host=host)
    for host in ("0.0.0.0", "10.1.2.3", "node7"):
        with pytest.raises(SettingsError, match="API key"):
            ServerOptions("m", tmp_path / "log", host=host)
        ServerOptions("m", tmp_path / "log", host=host, api_key="secret")


def test_the_key_is_never_on_the_command_line_nor_printed(tmp_path: Path) -> None:
    options = ServerOptions("m", tmp_path / "log", api_key="it's: secret")
    path = server_module._write_key(options)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "secret" not in " ".join(server_module.server_command(options, 1, path)) + repr(options)


def test_what_a_server_sees_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("PYTHONPATH", "/own")
    on_cpu = server_module._environment(ServerOptions("m", tmp_path / "log", device="cpu", threads=3))
    assert on_cpu["PYTHONPATH"] == f"{CPU_STUB}:/own"
    assert on_cpu["OMP_NUM_THREADS"] == "3"
    assert not {"PYTHONDONTWRITEBYTECODE", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"} & on_cpu.keys()
    on_gpu = server_module._environment(ServerOptions("m", tmp_path / "log", device="cuda", gpus=(2, 3)))
    assert on_gpu["PYTHONPATH"] == "/own"
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_arguments_of_the_user_win_over_ours(tmp_path: Path) -> None:
    options = ServerOptions("m", tmp_path / "log", {"dtype": "bfloat16", "max_total_tokens": 99}, device="cpu")
    command = server_module.server_command(options, 1, None)
    assert "--dtype=bfloat16" in command and "--max-total-tokens=99" in command
    assert "--attention-backend=torch_native" in command
    assert not [word for word in command if word in ("--dtype=float32", "--max-total-tokens=16384")]


def test_free_ports_differ() -> None:
    assert len(set(free_ports(50))) == 50

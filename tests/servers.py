"""A real SGLang server on the CPU, started when the first test asks for it and shared by all that follow.

It is started as a user would, by `megatron-rl serve`, and has to end as a user would have it: at a signal, leaving nothing.
"""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_rl.rollout.client import Client
from megatron_rl.rollout.keeper import PR_SET_PDEATHSIG
from megatron_rl.rollout.replies import RoutingShape
from megatron_rl.rollout.server import ServerOptions
from tests.reference.tiny_checkpoint import SERVED, write_served_model

VOCABULARY: int = SERVED["vocab_size"]
SHAPE = RoutingShape(layers=2, chosen=2, experts=4)
START_SECONDS, END_SECONDS = 300.0, 30.0  # far above what it takes, there to end what hangs


@dataclass(frozen=True)
class Address:
    """Where the server is."""

    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@dataclass(frozen=True)
class TinyServer:
    """The running server, and the checkpoints that it can have: `model` is what it was started with, `other` has other weights.

    A test that changes the weights puts `model` back.
    """

    server: Address
    model: Path
    other: Path

    def client(self) -> Client:
        return Client(self.server.url, VOCABULARY)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The served model with two sets of weights."""
    folder = tmp_path_factory.mktemp("models")
    return write_served_model(folder / "model", seed=0), write_served_model(folder / "other", seed=1)


@pytest.fixture(scope="session")
def tiny_server(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServer]:
    model, other = tiny_models
    folder = tmp_path_factory.mktemp("server")
    urls, output = folder / "urls", folder / "output"
    settings = ["sglang.enable_return_routed_experts=true", "device.kind=cpu", "device.threads=1", f"servers.logs={folder}"]
    command = [sys.executable, "-m", "megatron_rl.cli", "serve", str(model), *settings, "--urls", str(urls)]
    root = Path(__file__).parents[1]
    with open(output, "w") as file:
        serving = subprocess.Popen(command, cwd=root, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_end_with_tests)
    deadline = time.monotonic() + START_SECONDS
    while not urls.exists():
        assert serving.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    (url,) = urls.read_text().split()
    yield TinyServer(Address(url), model, other)
    serving.terminate()
    time.sleep(0.5)
    serving.send_signal(signal.SIGINT)  # the impatient press Ctrl-C twice; it changes nothing
    assert serving.wait(END_SECONDS) == 0, output.read_text()
    assert urls.read_text() == ""
    left = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if str(model).encode() in read(path)]
    assert not left, f"processes {left} are left of the server"


def _end_with_tests() -> None:
    """Linux ends it when the tests are killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def server_options(model: Path, log: Path) -> ServerOptions:
    """Of another server like it, for tests that need one to torment."""
    return ServerOptions(
        model, log, {"enable_return_routed_experts": True}, device="cpu", threads=1, start_seconds=START_SECONDS
    )

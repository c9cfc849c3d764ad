"""A real SGLang server on the CPU, started when the first test asks for it and shared by all that follow."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_rl.rollout.client import Client
from megatron_rl.rollout.replies import RoutingShape
from megatron_rl.rollout.server import Server, ServerOptions, start_servers
from tests.reference.tiny_checkpoint import SERVED, write_served_model

VOCABULARY: int = SERVED["vocab_size"]
SHAPE = RoutingShape(layers=2, chosen=2, experts=4)


@dataclass(frozen=True)
class TinyServer:
    """The running server, and the checkpoints that it can have: `model` is what it was started with, `other` has other weights.

    A test that changes the weights puts `model` back.
    """

    server: Server
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
    options = server_options(model, tmp_path_factory.mktemp("server") / "server.log")
    (server,) = asyncio.run(start_servers([options]))
    with server:
        yield TinyServer(server, model, other)


def server_options(model: Path, log: Path) -> ServerOptions:
    arguments = {"enable_return_routed_experts": True, "max_total_tokens": 16384, "weight_version": "0"}
    return ServerOptions(model, log, arguments, device="cpu", threads=1, start_seconds=300)

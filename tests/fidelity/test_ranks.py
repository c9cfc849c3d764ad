"""A look from several ranks: policy after policy is opened on them, the main one has the server, all end alike."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.bench import Draws, bench
from megatron_rl.fidelity.examine import Wanted, examine
from megatron_rl.fidelity.report import Report, Stage, Tolerance
from megatron_rl.fidelity.tokens import Compared
from megatron_rl.policy.layout import Launch
from tests.fidelity.test_tokens import made_up
from tests.parallel.cluster import Cluster
from tests.servers import TinyServer

PROMPTS = [[5, 9, 3, 7, 11, 4], [8, 2, 6, 100, 17, 30, 41]]
TOKENS = 12


def look(launch: Launch, settings: dict[str, Any]) -> dict[str, Any]:
    """What a rank ends with."""
    given, wanted = Settings.model_validate(settings), Wanted(max(map(len, PROMPTS)) + TOKENS, 1.0, False)
    if launch.rank:
        return examine(given, launch, None, wanted, lambda what: None).as_json()
    with bench(given, Draws(PROMPTS, TOKENS, 1.0), lambda done, total: None) as hands:
        return examine(given, launch, hands, wanted, lambda what: None).as_json()


def test_two_ranks_find_what_one_does(cluster: Cluster, tiny_server: TinyServer) -> None:
    """Experts, or sequences, on two ranks. The cause takes several policies, of which one is put back."""
    settings: dict[str, Any] = {
        "policy": {"init": tiny_server.model},
        "precision": {"dtype": "bfloat16"},
        "servers": {"urls": [tiny_server.server.url]},
    }
    for layout in ({"expert": 2}, {"context": 2}):
        main, other = cluster.run("tests.fidelity.test_ranks:look", 2, settings={**settings, "layout": layout})
        assert main["cause"] == "precision" and main["stages"][-1]["within"] and main["stages"][-1]["max"] < 1e-5
        assert json.dumps(main) == json.dumps(other)


@pytest.mark.parametrize(("rank", "code"), [("0", 1), ("1", 0)])
def test_only_the_rank_that_tells_ends_as_it_tells(
    rank: str, code: int, tiny_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher ends all ranks with the first that ends badly: the main one would not come to speak."""
    drawn, ours, _ = made_up(0)
    report = Report({}, {}, [Stage("as it is", "", Compared.of(drawn, ours), Tolerance.of("fp8", "fp8", None))], [], [], [])
    monkeypatch.setattr(importlib.import_module("megatron_rl.cli.mismatch"), "_look", lambda *_: report)
    started = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = CliRunner().invoke(app, ["mismatch", str(tiny_models[0])], env=started)
    assert result.exit_code == code and ("Policy and server differ" in result.output) == (code == 1)

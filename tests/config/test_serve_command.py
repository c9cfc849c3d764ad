"""`megatron-rl serve` before it starts anything: what it would start, what it refuses. tests/servers.py starts it for real."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_rl.cli import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_a_dry_run_prints_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("policy: {init: base}\nsglang: {enable_metrics: true}\ndevice: {kind: cpu}\nservers: {count: 1}\n")
    (tmp_path / "base").mkdir()
    result = run(path, "--servers", "2", "sglang.max_total_tokens=99", "--dry-run")
    assert result.exit_code == 0
    words = result.output.split()
    assert words.count("--enable-metrics") == words.count("--max-total-tokens=99") == 2
    assert words.count(f"--model-path={tmp_path / 'base'}") == 2


def test_a_model_needs_no_settings_file() -> None:
    result = run("org/name", "device.kind=cpu", "--dry-run")
    assert result.exit_code == 0 and "--model-path=org/name" in result.output.split()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m", "sglang.tp_sise=2"], "Did you mean sglang.tp_size?"),
        (["m", "sglang.port=2"], "servers.port"),
        (["m", "servers.cuont=2"], "Did you mean servers.count?"),
        (["m", "servers.host=0.0.0.0", "servers.api_key_file=nowhere"], "servers.api_key_file = nowhere: it cannot be read"),
        (["m", "servers.urls=[http://a:1]"], "Add --servers"),
        (["m", "servers.urls=[a:1]"], "Write it as http://host:port"),
        (["m", "servers.count=0"], "nobody would sample"),
        (["m", "servers.router=http://r:1", "servers.update=retract"], "Set servers.update=abort"),
        (["servers.count=2"], "is an override where"),
        (["missing.yaml"], "missing.yaml"),
        (["./missing"], "./missing does not exist. Give a checkpoint folder"),
        (["runs/one/missing"], "runs/one/missing does not exist"),
    ],
)
def test_what_cannot_be_served_is_told(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.output

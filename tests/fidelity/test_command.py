"""`megatron-rl mismatch` as a user runs it: exit codes, the page, what it refuses."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_rl.cli import app
from megatron_rl.fidelity.setup import prompts_of, settings_of
from megatron_rl.policy.checkpoint import CheckpointWriter
from megatron_rl.policy.state import save_policy
from tests.policy.single import opened, tiny_settings
from tests.reference.tiny_checkpoint import write_served_checkpoint, write_served_model
from tests.servers import TinyServer


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["mismatch", *map(str, arguments)])


def test_it_ends_with_0_where_both_agree_and_writes_a_page_that_needs_no_other(tiny_server: TinyServer, tmp_path: Path) -> None:
    small = ("--prompts", 2, "--tokens", 8, "precision.dtype=float32")
    result = run(tiny_server.model, "--server", tiny_server.server.url, *small, "--out", tmp_path / "seen")
    assert result.exit_code == 0, result.output
    assert "2 default texts, 8 tokens sampled for each" in result.output and "Policy and server agree" in result.output
    page, found = ((tmp_path / "seen" / f"mismatch.{kind}").read_text() for kind in ("html", "json"))
    assert not re.search(r"(src|href)=|url\(|@import|<script|<link", page) and page.count("<svg") == 4
    told = json.loads(found)
    assert told["within"] and told["cause"] is None and [row["layer"] for row in told["by_routing"]] == [0, 1]
    assert told["stages"][0]["tokens"] == 16 and "https://" not in page and "nan" not in found.lower()

    result = run(tiny_server.model, "--server", tiny_server.server.url, *small, "--temperature", 0.6, "--json")
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told["cause"] == "temperature" and [stage["within"] for stage in told["stages"]] == [False, True]

    result = run(tiny_server.model, "--server", tiny_server.server.url, *small, "--temperature", 0.6, "--tolerance", 9)
    assert result.exit_code == 0 and "as asked" in result.output


def test_what_it_refuses(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    model = tiny_models[0]
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere is no folder. Name a Hugging Face folder"),
        ((model, "--server", "127.0.0.1"), "--server 127.0.0.1: expected a server's address"),
        ((model, "--server", "http://127.0.0.1:9", "precision.dtype=float32"), "Is an SGLang server running there?"),
        ((model, "precision.dtyp=float32"), "Did you mean precision.dtype"),
        ((model, 'servers.urls=["http://127.0.0.1:9"]'), "a server that runs is named by --server URL"),
        ((model, "--out", model / "config.json"), "config.json cannot be made: [Errno 17] File exists"),
        ((model, "servers.count=2"), "servers.count = 2: one server is looked at"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output


def test_what_a_server_cannot_do_is_told(tiny_server: TinyServer, tmp_path: Path) -> None:
    other = write_served_checkpoint(tmp_path / "other", "qwen3_moe", num_hidden_layers=2, num_experts=4, vocab_size=504)
    result = run(other, "--server", tiny_server.server.url, "precision.dtype=float32", "--prompts", 1, "--tokens", 2)
    assert result.exit_code == 2 and "whose vocabulary has 512 tokens" in " ".join(result.output.split()), result.output
    long = run(
        tiny_server.model, "--server", tiny_server.server.url, "precision.dtype=float32", "--prompts", 1, "--tokens", 2048
    )
    assert long.exit_code == 2 and "maximum context length of 2048 tokens" in " ".join(long.output.split()), long.output


def test_an_own_server_computes_as_the_policy_does(tmp_path: Path) -> None:
    model = write_served_model(tmp_path / "model")
    settings = settings_of(model, ["precision.dtype=float32"], [])
    assert settings.sglang["dtype"] == "float32" and settings.sampling.routing and settings.servers.count == 1
    assert settings_of(model, ["sglang.dtype=bfloat16"], []).sglang["dtype"] == "bfloat16"
    assert settings_of(model, [], ["http://127.0.0.1:1"]).servers.urls == ("http://127.0.0.1:1",)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_checkpoint_of_a_run_is_taken_as_it_was_trained(precision: str, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path / "model", precision={"dtype": precision}, policy={
        "config": tmp_path / "model" / "config.json", "temperature": 0.8})  # fmt: skip
    with opened(settings) as policy:
        saved = save_policy(CheckpointWriter(tmp_path / "checkpoints", policy.layout, 1), policy, step=7)
    found = settings_of(saved, [], [])
    assert found.policy.temperature == 0.8 and found.precision.dtype == precision and found.policy.init == saved
    assert found.servers.model is not None and Path(found.servers.model).exists()
    assert (found.sglang["dtype"], found.sglang["load_format"]) == (precision, "dummy")
    assert settings_of(saved, ["policy.temperature=1.0"], []).policy.temperature == 1


def test_the_tokenizer_lies_beside_the_config_however_that_is_named(tiny_models: tuple[Path, Path]) -> None:
    model = tiny_models[0]
    for config in (model, model / "config.json"):
        assert prompts_of(settings_of(model, [f"policy.config={config}"], []), (), 2)[1] == "2 default texts"

"""`megatron-rl convert` as a user meets it, and what `megatron-rl publish` says where no server is needed to know better."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_rl.cli import app
from tests.reference.checkpoint import write_tiny_checkpoint
from tests.weights.convert_cases import require_equal, tensors_of


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_there_and_back_with_proofs(tmp_path: Path) -> None:
    source, megatron, back = (tmp_path / name for name in ("source", "megatron", "back"))
    write_tiny_checkpoint("qwen3_moe", source)
    layout = ("layout.tensor=2", "layout.expert=2")
    code, said, _ = run("--from", source, "--to", megatron, "--format", "megatron", *layout, "--verify", "--verify-logits")
    assert code == 0
    assert "written: " in said and " MB/s" in said
    assert "tensors: every checksum is the source's" in said and "logits of Megatron and transformers differ by " in said
    assert json.loads((megatron / "manifest.json").read_text())["layout"]["expert"] == 2
    assert len(list(megatron.glob("rank_*"))) == 2
    code, said, _ = run("--from", megatron, "--to", back, "--format", "hf", "--shard-size", "100KB", "--verify")
    assert code == 0 and "every checksum" in said
    assert max(path.stat().st_size for path in back.glob("*.safetensors")) < 120_000
    require_equal(tensors_of(back), tensors_of(source))
    code, said, _ = run("--from", source, "--to", tmp_path / "fp8", "--format", "hf", "--dtype", "fp8", "--verify")
    assert code == 0 and "every checksum" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "megatron", "layout.tensors=2"], "layout.tensor"),
        (["--format", "megatron", "layout.tensor=3"], "layout.tensor = 3: the model's 4 attention heads"),
        (["--format", "megatron", "optimizer.lr=2"], "only the layout is chosen here"),
        (["--format", "hf", "layout.tensor=2"], "a Hugging Face checkpoint has no layout"),
        (["--format", "hf", "--shard-size", "5 elephants"], "expected a number and KB, MB, GB or TB"),
        (["--format", "hf", "--like", "configs"], "has a config.json of its own"),
        (["--format", "hf", "--processes", "0"], "Invalid value"),
    ],
)
def test_what_cannot_work_ends_with_a_message(more: list[str], message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tiny_checkpoint("qwen3", source)
    code, _, errors = run("--from", source, "--to", tmp_path / "target", *more)
    assert code == 2 and message in errors
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_logits_of_another_model_are_found(tmp_path: Path) -> None:
    """The proof can fail."""
    source, megatron, other = (tmp_path / name for name in ("source", "megatron", "other"))
    write_tiny_checkpoint("qwen3", source)
    write_tiny_checkpoint("qwen3", other, seed=1)
    assert run("--from", source, "--to", megatron, "--format", "megatron")[0] == 0
    from megatron_rl.policy.verify_logits import verify_logits

    assert verify_logits(megatron, source) < 1e-5 < 1e-3 < verify_logits(other, source)


def test_publish_says_what_it_wants_and_what_it_did_not_do(tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen3", tmp_path / "model")
    wrong = CliRunner().invoke(app, ["publish", str(tmp_path / "model"), "--server", "127.0.0.1:9"])
    assert wrong.exit_code == 2 and "expected a server's address, such as http://127.0.0.1:30000" in wrong.stderr
    nobody = CliRunner().invoke(app, ["publish", str(tmp_path / "model"), "--server", "http://127.0.0.1:9"])
    assert (
        nobody.exit_code == 1 and "no connection (Connection refused)" in nobody.stdout and "nothing was sent" in nobody.stdout
    )

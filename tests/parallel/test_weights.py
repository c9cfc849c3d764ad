"""Weights on many ranks: each reads its own part and computes what transformers does, and together they give them back."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.policy.verify_logits import random_tokens
from megatron_rl.weights.convert import Conversion
from megatron_rl.weights.hf_output import Format
from tests.parallel.cluster import Cluster
from tests.parallel.weight_jobs import Started
from tests.reference.checkpoint import write_tiny_checkpoint
from tests.reference.oracle import Oracle
from tests.reference.tiny import TINY
from tests.weights.convert_cases import WIDE, contents, quietly, tensors_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 1": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "expert 2": (2, {"expert": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2, pipeline 2, expert 2": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "tensor 2, expert 2, expert tensor 2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "pipeline 2, virtual 2, data 2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
}
DENSE = [family for family, fields in TINY.items() if not any("expert" in field for field in fields)]
SOME = ("qwen2", "deepseek_v3")
# Every family with the first five, unless it has no experts to spread; the others with some.
CASES = [
    (family, name)
    for number, name in enumerate(LAYOUTS)
    for family in TINY
    if (number < 5 or family in SOME) and not (name == "expert 2" and family in DENSE)
]
TOLERANCE = 1e-5  # of the largest logit, float32 against float64
BUCKET = 10_000  # numbers
BIG = {  # headers do not matter
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "vocab_size": 512,
    "initializer_range": 0.05,
}


def settings(folder: Path, layout: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "policy": {"init": folder},
        "precision": {"dtype": dtype},
        "batch": {"max_tokens": 64},
        "layout": layout,
    }


def layout_of(family: str, name: str) -> tuple[int, dict[str, Any]]:
    """What of a layout a family can have: dense models have no experts to spread."""
    ranks, layout = LAYOUTS[name]
    return ranks, {field: size for field, size in layout.items() if not (family in DENSE and field.startswith("expert"))}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's checkpoint, made once, and transformers' logits of it in float64."""
    root = tmp_path_factory.mktemp("published")

    @cache
    def make(family: str) -> tuple[Path, dict[int, torch.Tensor]]:
        changes: dict[str, Any] = {field: value for field, value in BIG.items() if field in TINY[family] and family in SOME}
        state = write_tiny_checkpoint(family, root / family, shard_size="3MB", **changes)
        oracle = Oracle({**TINY[family], **changes})
        oracle.model.load_state_dict(state)
        vocab = int(json.loads((root / family / "config.json").read_text())["vocab_size"])
        with torch.no_grad():
            return root / family, {each.index: oracle.logits(torch.from_numpy(each.tokens)) for each in random_tokens(vocab)}

    return make


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_policy_starts_from_its_own_share_computes_what_transformers_does_and_gives_it_back(
    family: str, name: str, cluster: Cluster, published: Any
) -> None:
    folder, expected = published(family)
    ranks, layout = layout_of(family, name)
    results: list[Started] = cluster.run(
        "tests.parallel.weight_jobs:start", ranks, settings=settings(folder, layout, "float32"), stored_bytes=4
    )
    logits: dict[int, torch.Tensor] = {}
    assert set().union(*(result.given_back for result in results)) == set(tensors_of(folder))
    for result in results:
        assert not result.differences and not result.spoiled
        assert result.bytes_counted <= result.bytes_read <= result.bytes_counted + 20_000  # the rest: config, index, /proc
        if family in SOME:  # large enough for headers not to count
            assert result.share <= result.bytes_read <= 1.05 * result.share
        logits |= result.logits
    assert logits.keys() == expected.keys()
    largest = max(float(table.abs().max()) for table in expected.values())
    for index, table in expected.items():
        assert float((logits[index] - table).abs().max()) <= TOLERANCE * largest


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
@pytest.mark.parametrize("name", list(LAYOUTS)[4:])
def test_hf_tensors_come_together(name: str, family: str, cluster: Cluster, tmp_path: Path) -> None:
    """Bitwise what the checkpoint holds, at most a bucket at a time; an export has the bytes of an offline conversion."""
    ranks, layout = layout_of(family, name)
    changes = {**WIDE, "num_hidden_layers": 4} if family == "deepseek_v3" else {}
    dtype: Format = "bfloat16" if family == "deepseek_v3" else "float32"
    source = tmp_path / "source"
    write_tiny_checkpoint(family, source, dtype=getattr(torch, dtype), **changes)
    (source / "tokenizer.json").write_text("{}")
    expected = tensors_of(source)
    targets = [[0], list(range(ranks))]
    shard_size = 300_000 if family == "deepseek_v3" else 60_000  # bytes: more files than ranks
    formats: list[Format] = [dtype, "fp8"] if family == "deepseek_v3" else ["float32", "bfloat16"]
    results = cluster.run(
        "tests.parallel.weight_jobs:gather_and_export",
        ranks,
        settings=settings(source, layout, dtype),
        bucket=BUCKET,
        targets=targets,
        folder=tmp_path / "run",
        formats=formats,
        shard_size=shard_size,
    )
    for choice, chosen in enumerate(targets):
        got: dict[str, torch.Tensor] = {}
        for rank, result in enumerate(results):
            found, most = result[choice]
            assert bool(found) == (rank in chosen)
            assert most <= max([BUCKET, *(tensor.numel() for tensor in found.values())])
            got |= found
        assert got.keys() == expected.keys()
        for tensor_name, tensor in expected.items():
            bias = tensor_name.endswith("e_score_correction_bias")
            assert got[tensor_name].dtype == (torch.float32 if bias else tensor.dtype)
            assert torch.equal(got[tensor_name], tensor.to(got[tensor_name].dtype)), tensor_name
    for format in formats:
        offline = Conversion(tmp_path / "run/step_00000000", tmp_path / "offline" / format, "hf", shard_size=shard_size)
        quietly(replace(offline, dtype=format))
        ours, theirs = contents(tmp_path / "run" / format), contents(offline.target)
        assert len([each for each in ours if each.startswith("model-")]) > ranks and ours == theirs


def test_an_export_that_fails_is_told_to_all_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen3", tmp_path / "source")
    options = {"settings": settings(tmp_path / "source", {"tensor": 2}, "float32"), "folder": tmp_path / "export", "rank": 1}
    told = cluster.run("tests.parallel.weight_jobs:export_with_a_failure", 2, **options)
    assert (
        all("CheckpointError" in text and "holds numbers that are not finite" in text for text in told) and told[0] == told[1]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

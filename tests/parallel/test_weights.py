"""Weights that live on many ranks: what each holds is what the map says, and HF tensors come together from all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.cluster import Cluster
from tests.reference.checkpoint import write_tiny_checkpoint

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor 2, pipeline 2, expert 2": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "tensor 2, expert 2, expert tensor 2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "pipeline 2, virtual 2, data 2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
    "expert 2, context 2": (4, {"expert": 2, "context": 2}),
}
BUCKET = 10_000  # numbers


def settings(folder: Path, layout: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "policy": {"init": folder},
        "precision": {"dtype": dtype},
        "batch": {"max_tokens": 64},
        "layout": layout,
    }


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("targets", [[0], [0, 1, 2, 3]], ids=["to one", "to all"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_hf_tensors_come_together(name: str, family: str, targets: list[int], cluster: Cluster, tmp_path: Path) -> None:
    """Every tensor bitwise what the checkpoint holds, at most a bucket at a time, under layouts that hold it in pieces."""
    ranks, layout = LAYOUTS[name]
    if family == "qwen2":
        layout = {field: size for field, size in layout.items() if not field.startswith("expert")}
    dtype = "bfloat16" if targets == [0] else "float32"
    write_tiny_checkpoint(family, tmp_path, dtype=getattr(torch, dtype))
    expected = published(tmp_path)
    targets = [target for target in targets if target < ranks]
    results = cluster.run(
        "tests.parallel.weight_jobs:gather_everywhere",
        ranks,
        settings=settings(tmp_path, layout, dtype),
        bucket=BUCKET,
        targets=targets,
    )
    got: dict[str, torch.Tensor] = {}
    for rank, (differences, found, most) in enumerate(results):
        assert not differences
        assert bool(found) == (rank in targets)
        assert most <= max(BUCKET, max(tensor.numel() for tensor in found.values()) if found else 0)
        got |= found
    assert got.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        bias = tensor_name.endswith("e_score_correction_bias")
        assert got[tensor_name].dtype == (torch.float32 if bias else tensor.dtype)
        assert torch.equal(got[tensor_name], tensor.to(got[tensor_name].dtype)), tensor_name

"""Checkpoints move between layouts with everything in them, and a save that dies leaves the one before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.weights.checkpoint_files import latest_checkpoint
from tests.parallel.cluster import Cluster
from tests.parallel.jobs import Trained, toy_sequences
from tests.reference.tiny import write_tiny_config

SAVED: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor 2, expert 2": (2, {"tensor": 2, "expert": 2}),
    "data 4, expert 2": (4, {"expert": 2}),
    "pipeline 2, virtual 2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}
LOADED: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, replicated optimizer": (1, {"distributed_optimizer": False}),
    "data 2": (2, {}),
    "tensor 2, pipeline 2, expert 2, expert tensor 1": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "context 2, expert 2, expert tensor 1": (2, {"context": 2, "expert": 2}),
    "expert 2, expert tensor 2": (4, {"expert": 2, "expert_tensor": 2}),
}


def settings(folder: Path, layout: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "policy": {"config": write_tiny_config("deepseek_v3", folder), "seed": 1},
        "precision": {"dtype": dtype},
        "optimizer": {"lr": 1e-3, "eps": 1e-3, "warmup_steps": 3},
        "moe": {"expert_bias_update_rate": 1e-3},
        "batch": {"max_tokens": 64},
        "layout": layout,
    }


def train(cluster: Cluster, ranks: int, **arguments: Any) -> Trained:
    sequences = toy_sequences(0, 7, 120, 40)
    result: Trained = cluster.run("tests.parallel.jobs:train_from", ranks, sequences=sequences, **arguments)[0]
    return result


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(cluster, 1, settings=settings(folder, {}, "float32"), steps=4, root=folder)


@pytest.mark.parametrize("saved", SAVED)
def test_another_layout_continues_equal(saved: str, cluster: Cluster, uninterrupted: Trained, tmp_path: Path) -> None:
    ranks, layout = SAVED[saved]
    train(cluster, ranks, settings=settings(tmp_path, layout, "float32"), steps=2, root=tmp_path, save=True)
    for loaded, (ranks, layout) in LOADED.items():
        trained = train(cluster, ranks, settings=settings(tmp_path, layout, "float32"), steps=2, root=tmp_path, load=True)
        np.testing.assert_allclose(trained.losses, uninterrupted.losses[2:], rtol=1e-5, err_msg=loaded)
        np.testing.assert_allclose(trained.grad_norms, uninterrupted.grad_norms[2:], rtol=1e-4, err_msg=loaded)
        for name, expected in {**uninterrupted.weights, **uninterrupted.moments}.items():
            actual = {**trained.weights, **trained.moments}[name]
            # As between layouts in general: 1e-5 of the largest number; twice that for squares.
            scale = max(float(np.abs(expected).max()), 1e-2 if name.startswith("model") else 0.0)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * scale, err_msg=f"{name}, {loaded}")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_same_layout_continues_identically(asynchronous: bool, cluster: Cluster, tmp_path: Path) -> None:
    """bfloat16 weights with float32 masters: not a bit differs from the run that was never stopped."""
    layout = {"expert": 2}
    whole = train(cluster, 2, settings=settings(tmp_path, layout, "bfloat16"), steps=4, root=tmp_path / "a")
    half: dict[str, Any] = {"settings": settings(tmp_path, layout, "bfloat16"), "steps": 2, "root": tmp_path / "b"}
    train(cluster, 2, save=True, asynchronous=asynchronous, **half)
    rest = train(cluster, 2, load=True, **half)
    assert rest.losses == whole.losses[2:]
    for name, expected in {**whole.weights, **whole.moments}.items():
        np.testing.assert_array_equal({**rest.weights, **rest.moments}[name], expected, err_msg=name)


@pytest.mark.parametrize("at", ["file written", "renaming", "replacing", "deleting"])
def test_killed_save_leaves_a_checkpoint(at: str, cluster: Cluster, tmp_path: Path) -> None:
    """Ranks are killed with -9 at several instants of a save: a complete checkpoint still loads, and training goes on."""
    layout = settings(tmp_path, {"expert": 2}, "float32")
    first = train(cluster, 2, settings=layout, steps=1, root=tmp_path, save=True)
    with pytest.raises(RuntimeError, match="died"):
        cluster.run(
            "tests.parallel.jobs:die_while_saving",
            2,
            settings=layout,
            sequences=toy_sequences(0, 7, 120, 40),
            root=tmp_path,
            at=at,
        )
    latest = latest_checkpoint(tmp_path)
    names = {"deleting": "step_00000002", "replacing": "step_00000001.replaced"}
    assert latest is not None and latest.name == names.get(at, "step_00000001")
    again = train(cluster, 2, settings=layout, steps=0, root=tmp_path, load=True)
    if at != "deleting":
        for name, expected in first.weights.items():
            np.testing.assert_array_equal(again.weights[name], expected, err_msg=name)
    train(cluster, 2, settings=layout, steps=2, root=tmp_path, load=True, save=True)  # leftovers are in nobody's way
    assert not [path for path in tmp_path.glob("step_*") if path.suffix in (".partial", ".deleted")]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == ("step_00000004" if at == "deleting" else "step_00000003")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_is_told_to_all(rank: int, cluster: Cluster, tmp_path: Path) -> None:
    layout = settings(tmp_path, {"expert": 2}, "float32")
    told = cluster.run("tests.parallel.jobs:fail_to_save", 2, settings=layout, root=tmp_path, rank=rank)
    problem = {0: "cannot be written: NotADirectoryError", 1: "rank 1 could not write its file"}[rank]
    assert all(problem in text and "Earlier checkpoints are untouched" in text for text in told)
    assert latest_checkpoint(tmp_path) is None

"""The layout never changes the result: every layout against one rank, number by number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.cluster import Cluster
from tests.parallel.jobs import Arrays, Trained, toy_sequences
from tests.reference.tiny import write_tiny_config

# Grouped-query attention, shared experts, sigmoid routing with bias, a dense first layer — and the same with latent attention.
MODELS = ("glm4_moe", "deepseek_v3")
STEPS = 3
TOLERANCE = 1e-5  # of the largest number of a tensor, in float32; another order of summation makes 1e-6 … 7e-6
# Biases start at zero and are of the size of a few updates, of which the same share may be off.
SMALLEST_SCALE = 1e-2

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2, unequal work": (2, {}),
    "data 2, replicated optimizer": (2, {"layout": {"distributed_optimizer": False}}),
    "tensor 2, sequence parallel": (2, {"layout": {"tensor": 2}}),
    "pipeline 2": (2, {"layout": {"pipeline": 2}}),
    "pipeline 2, uneven": (2, {"layout": {"pipeline": 2, "pipeline_layers": [1, 3]}}),
    "pipeline 2, virtual 2": (2, {"layout": {"pipeline": 2, "virtual_pipeline": 2}}),
    "expert 2": (2, {"layout": {"expert": 2}}),
    "expert 2, allgather": (2, {"layout": {"expert": 2}, "moe": {"dispatcher": "allgather"}}),
    "context 2": (2, {"layout": {"context": 2}}),
    "tensor 2, expert 2, expert tensor 1": (2, {"layout": {"tensor": 2, "expert": 2}}),
    "tensor 2, expert 2, expert tensor 2": (4, {"layout": {"tensor": 2, "expert": 2, "expert_tensor": 2}}),
    "tensor 2, pipeline 2, expert 2": (4, {"layout": {"tensor": 2, "pipeline": 2, "expert": 2}}),
    "tensor 2, context 2": (4, {"layout": {"tensor": 2, "context": 2, "expert": 2}}),
    "expert 2, data 4, overlapped": (
        4,
        {"layout": {"expert": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "pipeline 2, virtual 2, data 2, overlapped": (
        4,
        {"layout": {"pipeline": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "tensor 2, recomputed": (2, {"layout": {"tensor": 2}, "recompute": {"mode": "full"}}),
    "expert 2, recomputed in part": (
        2,
        {"layout": {"expert": 2}, "recompute": {"mode": "selective", "modules": ["core_attn", "moe_act", "layernorm"]}},
    ),
}


def run(
    cluster: Cluster, folder: Path, model: str, ranks: int, sections: dict[str, Any], bucket_size: int | None = None
) -> Trained:
    settings: dict[str, Any] = {
        "policy": {"config": write_tiny_config(model, folder), "seed": 1},
        "precision": {"dtype": "float32"},
        # A large epsilon: Adam divides by the gradient's size, and would blow up rounding where that is nothing.
        "optimizer": {"lr": 1e-3, "eps": 1e-3},
        "batch": {"max_tokens": 64},
        "run": {"steps": STEPS},
        **sections,
    }
    if model in MODELS:
        settings["moe"] = {"expert_bias_update_rate": 1e-3, **settings.get("moe", {})}
    sequences = toy_sequences(0, 11, 120, 40)
    result: Trained = cluster.run(
        "tests.parallel.jobs:train",
        ranks,
        settings=settings,
        sequences=sequences,
        steps=STEPS,
        objective="gspo",
        bucket_size=bucket_size,
    )[0]
    return result


def test_tied_and_overlapped_in_small_buckets(cluster: Cluster, tmp_path: Path) -> None:
    """Weights arrive bucket by bucket while the next forward pass runs: whoever reads them must wait for them."""
    layout = {"pipeline": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}
    expected = run(cluster, tmp_path, "qwen2", 1, {})
    actual = run(cluster, tmp_path, "qwen2", 4, {"layout": layout}, bucket_size=4000)
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=TOLERANCE, atol=1e-6)
    assert worst(actual.gradients, expected.gradients)[0] < (TOLERANCE,)
    assert worst(actual.weights, expected.weights)[0] < (TOLERANCE,)


@pytest.fixture(scope="module")
def references(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return {model: run(cluster, tmp_path_factory.mktemp(model), model, 1, {}) for model in MODELS}


def worst(ours: Arrays, theirs: Arrays) -> list[tuple[float, str]]:
    """The largest differences, each as a share of its tensor's largest number."""
    assert ours.keys() == theirs.keys()
    errors = [
        (float(np.abs(ours[name] - theirs[name]).max() / max(np.abs(theirs[name]).max(), SMALLEST_SCALE)), name)
        for name in theirs
    ]
    return sorted(errors, reverse=True)[:3]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing(
    name: str, model: str, cluster: Cluster, references: dict[str, Trained], tmp_path: Path
) -> None:
    ranks, sections = LAYOUTS[name]
    expected, actual = references[model], run(cluster, tmp_path, model, ranks, sections)
    assert expected.log_probs.keys() == actual.log_probs.keys()
    for index, log_probs in expected.log_probs.items():
        np.testing.assert_allclose(actual.log_probs[index], log_probs, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(actual.entropy[index], expected.entropy[index], rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(actual.losses, expected.losses, rtol=TOLERANCE, atol=1e-6)
    np.testing.assert_allclose(actual.grad_norms, expected.grad_norms, rtol=TOLERANCE)
    for ours, theirs in zip(actual.metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-6)
    assert worst(actual.gradients, expected.gradients)[0] < (TOLERANCE,)
    assert worst(actual.weights, expected.weights)[0] < (TOLERANCE,)
    assert worst(actual.moments, expected.moments)[0] < (2 * TOLERANCE,)  # squares of gradients double their error


def test_first_step_is_on_policy(references: dict[str, Trained]) -> None:
    """Old and new log-probs of unchanged weights are the same bits, so every ratio is exactly one."""
    for trained in references.values():
        assert trained.metrics[0]["ratio"] == 1.0
        assert trained.metrics[0]["ratio_deviation"] == 0.0
        assert trained.metrics[1]["ratio_deviation"] > 0.0

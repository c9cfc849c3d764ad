"""Steps of the search that need no model and no server: what is tried of a server in these numbers, and what cannot be sent."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.examine import Wanted, _precision, _unsent, as_served
from megatron_rl.fidelity.report import Cause, Report, Stage, Tolerance
from megatron_rl.fidelity.search import Search
from megatron_rl.fidelity.server import Facts, Observation
from megatron_rl.fidelity.tokens import Compared
from megatron_rl.policy.layout import Launch
from tests.reference.tiny import write_tiny_config

PLAIN = Facts("http://a", "model", 0, "bfloat16", False, None, None, True, 1, "0.5.17", None)
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture
def search(tmp_path: Path) -> Search:
    config = write_tiny_config("qwen3_moe", tmp_path)
    settings = Settings.model_validate({"policy": {"config": config}, "precision": {"dtype": "float32"}})
    return Search(settings, Launch(), 8, None, read_architecture(config), 1.0, 1.0, tmp_path)


def of(search: Search, facts: Facts) -> Search:
    search.observe(Observation(facts, 1.0, []))
    return search


def test_a_format_that_the_policy_lacks_is_not_said_to_be_tried(search: Search) -> None:
    """SGLang takes float16 by itself for a float32 checkpoint."""
    _precision(of(search, replace(PLAIN, dtype="float16")), lambda what: pytest.fail(f"it began to: {what}"))
    assert "The server computes in float16, which the policy does not have" in search.notes["precision"]
    assert search.settings.precision.dtype == "float32" and not search.causes


def test_the_server_says_which_blocks() -> None:
    fp8 = replace(PLAIN, fp8=True, quantization=BLOCKS)
    assert as_served(fp8) == {"dtype": "bfloat16", "fp8": "simulated", "fp8_recipe": "blockwise"}
    for tensorwise in (replace(PLAIN, fp8=True, online="fp8"), replace(fp8, quantization={"quant_method": "fp8"})):
        assert as_served(tensorwise)["fp8_recipe"] == "tensorwise"
    assert as_served(PLAIN) == {"dtype": "bfloat16", "fp8": "off"}


def compared(*sizes: float) -> Compared:
    return Compared(np.array(sizes), -np.ones(len(sizes)), np.arange(len(sizes)))


def test_one_token_far_off_is_no_agreement() -> None:
    rounding = Tolerance.of("float32", "float32", None)
    assert rounding.holds(compared(*[0.0] * 999, 0.009)) and not rounding.holds(compared(*[0.0] * 9999, 0.011))
    assert not rounding.holds(compared(0.0, 0.0003))


def test_fp8_layers_that_differ_are_no_agreement() -> None:
    """Whatever the log-probs, which the format's tolerance may hide it in; and the largest cause is the cause."""
    stages = [Stage("as it is", "", compared(0.0, 0.0), Tolerance.of("fp8", "fp8", None))]
    report = Report({}, {}, stages, [], [], [])
    assert report.within and report.cause is None
    other = replace(report, problems=("1 weights are FP8 in the trainer and not in the servers",))
    assert not other.within and other.verdict.endswith(
        "FP8 layers differ: 1 weights are FP8 in the trainer and not in the servers"
    )
    causes = [Cause("temperature", "", 3.0, 2.9), Cause("stale weights", "", 2.9, 0.1), Cause("precision", "", 0.1, 0.0)]
    assert replace(report, causes=causes).cause == "stale weights"


def test_weights_that_the_server_would_not_take_are_not_sent(search: Search) -> None:
    allowed, asked = Wanted(8, 1.0, True), Wanted(8, 1.0, False)
    assert _unsent(of(search, PLAIN), allowed) is None
    assert _unsent(of(search, replace(PLAIN, fp8=True, quantization=BLOCKS)), allowed) is None
    assert "Allow it with --resend" in str(_unsent(of(search, PLAIN), asked))
    own = replace(PLAIN, fp8=True, online="fp8")
    assert "makes its own numbers of them as it loads (--quantization fp8)" in str(_unsent(of(search, own), allowed))
    other = replace(PLAIN, fp8=True, quantization={"quant_method": "fp8"})
    assert "weights can be published to unquantised servers" in str(_unsent(of(search, other), allowed))

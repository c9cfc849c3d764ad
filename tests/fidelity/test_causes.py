"""Six planted causes against a real server, each of which the look must name; and that it says so where all is well."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fidelity.planted import WRONG_EXPERT, changed, looked, near_ties, older, serve, settings_of, weights_of
from tests.servers import TinyServer

EQUAL = 1e-5  # |Δlogp| of any token in float32, by the server's kernels and the policy's, routing replayed


@pytest.fixture
def served(tiny_server: TinyServer) -> Iterator[TinyServer]:
    """The shared server, which gets its own weights back."""
    yield tiny_server
    serve(tiny_server, tiny_server.model)


def test_where_all_is_well(tiny_server: TinyServer) -> None:
    report = looked(settings_of(tiny_server, tiny_server.model))
    assert report.within and report.cause is None and report.verdict.startswith("Policy and server agree")
    assert [stage.name for stage in (*report.stages, *report.aside)] == ["as it is", "handed over", "routing"]
    assert all(stage.compared.largest < EQUAL for stage in (*report.stages, *report.aside))
    agree = report.stages[0].compared.agree
    assert agree is not None and agree.all(), "both sides' routing is told of the same positions and layers"


def test_stale_weights(served: TinyServer, tmp_path: Path) -> None:
    """All matrices moved by a few updates. Sending the checkpoint's mends it, and is not done unasked."""
    serve(served, changed(served.model, tmp_path / "old", older(weights_of(served.model))))
    unasked = looked(settings_of(served, served.model))
    assert not unasked.within and unasked.cause != "stale weights"
    assert any("Allow it with --resend" in note for note in unasked.notes)
    assert unasked.cause == "weights or kernels" and "left to weights, which were not compared" in unasked.verdict
    report = looked(settings_of(served, served.model), may_send=True)
    assert report.cause == "stale weights" and [cause.name for cause in report.causes] == ["stale weights"]
    assert "36 of 45 parts were not the checkpoint's" in report.verdict  # the rest are norms, which are all ones
    assert report.stages[-1].within and report.stages[-1].compared.largest < EQUAL


def test_what_wrong_weights_hide_is_found_behind_them(served: TinyServer) -> None:
    """Of another model's weights, at another temperature and in another format: none of the two is half of the difference."""
    serve(served, served.other)
    report = looked(settings_of(served, served.model, precision={"dtype": "bfloat16"}), drawn_at=0.8, may_send=True)
    assert [cause.name for cause in report.causes] == ["temperature", "stale weights", "precision"]
    assert report.cause == "stale weights" and report.stages[-1].within
    assert report.stages[1].compared.mean > 0.5 * report.stages[0].compared.mean, "the temperature alone does not show"


def test_stale_weights_by_their_number(tiny_server: TinyServer) -> None:
    """Where nothing may be sent, the server's word for its weights is held against the checkpoint's step."""
    report = looked(settings_of(tiny_server, tiny_server.other), step=3)
    assert report.cause == "stale weights" and "those of step 0; the checkpoint is of step 3" in report.verdict


def test_one_wrong_expert(served: TinyServer, tmp_path: Path) -> None:
    weights = weights_of(served.model)
    wrong = {**weights, WRONG_EXPERT: weights[WRONG_EXPERT].flip(0).contiguous()}
    serve(served, changed(served.model, tmp_path / "wrong", wrong))
    report = looked(settings_of(served, served.model), may_send=True)
    assert report.cause == "wrong tensors" and report.differing == [WRONG_EXPERT] and WRONG_EXPERT in report.verdict
    assert report.stages[-1].within


def test_temperature(tiny_server: TinyServer) -> None:
    report = looked(settings_of(tiny_server, tiny_server.model), drawn_at=0.7)
    assert [cause.name for cause in report.causes] == ["temperature"] and report.stages[-1].within
    assert "samples at 0.7 and the policy takes log-probs at 1" in report.verdict


def test_temperature_that_nobody_tells(tiny_server: TinyServer) -> None:
    """The server is said to sample at 1 and does at 0.5: the numbers alone tell."""
    report = looked(settings_of(tiny_server, tiny_server.model), drawn_at=0.5, said=1.0)
    assert report.cause == "temperature" and "as if sampled at about 0.5" in report.verdict


def test_number_format(tiny_server: TinyServer) -> None:
    report = looked(settings_of(tiny_server, tiny_server.model, precision={"dtype": "bfloat16"}))
    assert [cause.name for cause in report.causes] == ["precision"] and report.stages[-1].within
    assert "the policy computes in bfloat16 and the server in float32" in report.verdict


def test_rotary_base(tiny_server: TinyServer, tmp_path: Path) -> None:
    other = changed(tiny_server.model, tmp_path / "other", rope_theta=50000.0)
    report = looked(settings_of(tiny_server, tiny_server.model, policy={"config": other}))
    assert [cause.name for cause in report.causes] == ["config"] and report.stages[-1].within
    assert "rope.base is 50000 for the policy and 1000 for the server" in report.verdict


def test_routing(served: TinyServer, tmp_path: Path) -> None:
    """Routers near ties choose by rounding: replaying the server's choice (R3) leaves what any model has in float32."""
    ties = changed(served.model, tmp_path / "ties", near_ties(weights_of(served.model)))
    serve(served, ties)
    report = looked(settings_of(served, ties))
    assert [cause.name for cause in report.causes] == ["routing"] and "objective.routing_replay=rollout" in report.verdict
    assert report.stages[0].compared.mean > 0.1 and report.stages[-1].compared.largest <= EQUAL
    agree = report.stages[0].compared.agree
    assert agree is not None and 0.1 < agree.mean() < 0.9

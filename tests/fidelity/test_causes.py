"""Six planted causes against a real server, each of which the look must name; and that it says so where all is well."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fidelity.planted import WRONG_EXPERT, changed, looked, near_ties, older, serve, settings_of, weights_of
from tests.servers import TinyServer


@pytest.fixture
def served(tiny_server: TinyServer) -> Iterator[TinyServer]:
    """The shared server, which gets its own weights back."""
    yield tiny_server
    serve(tiny_server, tiny_server.model)


def test_alike(tiny_server: TinyServer) -> None:
    report = looked(settings_of(tiny_server, tiny_server.model))
    print(report.verdict, [(s.name, s.compared.summary()) for s in (*report.stages, *report.aside)])
    assert report.within and report.cause is None and not report.causes


def test_stale_weights(served: TinyServer, tmp_path: Path) -> None:
    serve(served, changed(served.model, tmp_path / "old", older(weights_of(served.model))))
    report = looked(settings_of(served, served.model), may_send=True)
    print(report.verdict)
    assert report.cause == "stale weights"


def test_one_wrong_expert(served: TinyServer, tmp_path: Path) -> None:
    weights = weights_of(served.model)
    serve(
        served, changed(served.model, tmp_path / "wrong", {**weights, WRONG_EXPERT: weights[WRONG_EXPERT].flip(0).contiguous()})
    )
    report = looked(settings_of(served, served.model), may_send=True)
    print(report.verdict)
    assert report.cause == "wrong tensors" and report.differing == [WRONG_EXPERT]


def test_temperature(tiny_server: TinyServer) -> None:
    report = looked(settings_of(tiny_server, tiny_server.model), drawn_at=0.7)
    print(report.verdict)
    assert report.cause == "temperature"


def test_precision(tiny_server: TinyServer) -> None:
    report = looked(settings_of(tiny_server, tiny_server.model, precision={"dtype": "bfloat16"}))
    print(report.verdict)
    assert report.cause == "precision"


def test_rotary_base(tiny_server: TinyServer, tmp_path: Path) -> None:
    other = changed(tiny_server.model, tmp_path / "other", rope_theta=50000.0)
    report = looked(settings_of(tiny_server, tiny_server.model, policy={"config": other}))
    print(report.verdict)
    assert report.cause == "config" and "rope.base" in report.verdict


def test_routing(served: TinyServer, tmp_path: Path) -> None:
    ties = changed(served.model, tmp_path / "ties", near_ties(weights_of(served.model)))
    serve(served, ties)
    report = looked(settings_of(served, ties))
    print(report.verdict)
    assert report.cause == "routing"
    from megatron_rl.fidelity.picture import page

    Path("/tmp/w/h/mm.html").write_text(page(report))

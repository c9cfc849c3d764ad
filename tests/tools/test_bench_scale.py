"""The benchmark of scale runs whole at its smallest size, and its arithmetic is right."""

import json
from pathlib import Path

import pytest

from tools.bench_scale import PARTS, Measured, exponent, main, table


def test_every_part_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but publishing, whose map of a model of 235 billion takes seconds."""
    parts = [part for part in PARTS if part != "publish"]
    main(["--ranks", "64", "--only", *parts, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ranks"] == [64] and list(found["parts"]) == parts
    assert all(second > 0 for each in found["parts"].values() for second in each[0]["seconds"].values())
    assert "| pool: a step of responses |" in capsys.readouterr().out


def test_exponents_and_what_is_told_of_them() -> None:
    sizes = (64, 128, 256)
    assert exponent(sizes, [3.0 * size**2 for size in sizes]) == pytest.approx(2.0)
    assert exponent(sizes, [5.0, 5.0, 5.0]) == pytest.approx(0.0)
    even = [Measured({"flat": 1.0, "linear": float(size)}, 1.0) for size in sizes]
    assert list(table(sizes, {"part": even}))[-1] == "nothing grows faster than n^1.2"
    uneven = [Measured({"square": float(size) ** 2}, 1.0) for size in sizes]
    assert list(table(sizes, {"part": uneven}))[-1] == "square: grows as n^2.00"


def test_a_size_that_the_layout_does_not_take() -> None:
    with pytest.raises(SystemExit):
        main(["--ranks", "100"])

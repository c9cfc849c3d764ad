"""docs/objectives.md says what the objectives are, and its pictures show what they compute."""

import re
from pathlib import Path

import pytest
import torch

from megatron_rl.objectives.catalogue import KINDS, catalogue
from megatron_rl.objectives.registry import SURROGATES
from tools.objective_docs import DOCS, PAGE, curve, draw, ratios, text


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(), "run python tools/objective_docs.py and commit what it writes"


def test_every_link_of_the_page_leads_somewhere() -> None:
    page = PAGE.read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", page))
    files = {link for link in links if not link.startswith(("#", "https://arxiv.org/abs/"))}
    assert {link for link in files if not (DOCS / link).is_file()} == set()
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", page, re.M)}
    assert {link for link in links if link.startswith("#") and link[1:] not in headings} == set()
    assert {f"objectives/{name}.svg" for name in SURROGATES} <= files


def test_everything_has_a_formula_and_describes_its_options() -> None:
    entries = catalogue()
    assert {(entry.kind, entry.name) for entry in entries} == {(kind, name) for kind, table in KINDS.items() for name in table}
    assert [entry.name for entry in entries if not entry.formula or not entry.text] == []
    assert [entry.name for entry in entries if not entry.papers and "no " not in entry.source] == []  # none, and it says so
    assert [f"{entry.name}.{option.name}" for entry in entries for option in entry.options if not option.text] == []


def test_a_row_of_a_table_is_told_from_its_neighbours() -> None:
    entry = next(entry for entry in catalogue() if (entry.kind, entry.name) == ("surrogate", "abc"))
    lines = entry.formula.splitlines()
    assert lines == ["clip(w, 1−ε2, 1+ε1) A for A > 0, clip(w, 1−ε4, 1+ε3) A for A < 0, no min:", lines[1]]
    assert lines[1] == "no gradient outside, in all four quadrants"
    assert entry.papers == ("2601.03895",) and entry.source == "ABC-GRPO arXiv 2601.03895"


@pytest.mark.parametrize("name, low, high", [("gspo", 3e-4, 4e-4), ("grpo", 0.2, 0.2)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_curves_are_those_of_the_formula(name: str, low: float, high: float, advantage: float) -> None:
    ratio, drawn = ratios(name), curve(name, advantage)
    assert ratio.min() < 1 - low and ratio.max() > 1 + high
    bounded = ratio.clamp(max=1 + high) if advantage > 0 else ratio.clamp(min=1 - low)
    inside = ratio <= 1 + high if advantage > 0 else ratio >= 1 - low
    torch.testing.assert_close(drawn.value, advantage * bounded)
    tie = ((ratio - (1 + high)).abs() < 1e-12) | ((ratio - (1 - low)).abs() < 1e-12)  # on the bound rounding decides
    torch.testing.assert_close(drawn.gradient[~tie], torch.where(inside, advantage * ratio, 0.0)[~tie])


@pytest.mark.parametrize("name", ["trpa", "rebel", "agro"])
def test_curves_of_pairs_lift_the_better_response_and_press_the_worse(name: str) -> None:
    near = (ratios(name) - 1).abs() < 0.05
    assert (curve(name, 1.0).gradient[near] > 0).all()
    assert (curve(name, -1.0).gradient[near] < 0).all()


def test_a_picture_is_drawn_the_same_each_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.svg" for i in range(2)]
    for path in paths:
        draw("gspo", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()

"""The acceptance on a GPU works where there is none: parts at a tiny size, the runner, what is written down, the table."""

import importlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tools.gpu_acceptance import kernels, models
from tools.gpu_acceptance.__main__ import main
from tools.gpu_acceptance.child import perform
from tools.gpu_acceptance.parts import PARTS, REFERENCE, chosen
from tools.gpu_acceptance.results import FILE, Finding, Outcome, Results, read_results
from tools.gpu_acceptance.running import run_part, todo
from tools.gpu_acceptance.table import LOSSES, UPDATE, as_markdown, lines

PAGE = Path(__file__).parents[2] / "docs/gpu.md"


# -- parts -----------------------------------------------------------------------------------------------------------------


def tried(name: str, folder: Path) -> Outcome:
    """A part of the smoke test, in this process."""
    perform(PARTS[name], folder, smoke=True)
    return read_results([folder])[name]


def values(outcome: Outcome) -> dict[str, float | str]:
    return {finding.name: finding.value for finding in outcome.findings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a reference in it."""
    made = tmp_path_factory.mktemp("results")
    assert tried("reference", made).state == "done"
    return made


def test_a_policy_equals_its_reference_and_is_told_from_another(folder: Path, tmp_path: Path) -> None:
    same = tried("equal float32", folder)
    assert same.state == "done" and same.good and [finding.kept for finding in same.findings] == [True] * 4
    with np.load(folder / REFERENCE) as file:
        arrays = dict(file)
    arrays["float32_before"] = arrays["float32_before"] + np.float32(0.001)
    np.savez(tmp_path / REFERENCE, **arrays)
    other = tried("equal float32", tmp_path)
    assert other.state == "done" and not other.good
    assert [finding.kept for finding in other.findings] == [False, True, True, True]
    np.savez(tmp_path / REFERENCE, **(arrays | {"about": np.array("another model")}))
    stale = tried("equal float32", tmp_path)
    assert stale.state == "failed" and "--only reference --again" in stale.reason


def test_bfloat16_has_its_own_bounds(folder: Path) -> None:
    found = tried("equal bfloat16", folder)
    assert found.good and all(finding.value for finding in found.findings), "rounding leaves a difference"


def test_ratios_are_exactly_one(tmp_path: Path) -> None:
    outcome = tried("ratio simulated-blockwise", tmp_path)
    *promised, stale = outcome.findings
    assert outcome.state == "done" and len(promised) == 4
    assert all(finding.value == finding.bound == 0.0 for finding in promised)
    assert isinstance(stale.value, float) and stale.value > 1e-3


def test_learning_is_measured(tmp_path: Path) -> None:
    found = {name: tried(name, tmp_path) for name in ("update bfloat16", "loss bfloat16", "loss simulated-blockwise")}
    assert all(outcome.good and outcome.state == "done" for outcome in found.values())
    update = {finding.name: finding for finding in found["update bfloat16"].findings}
    assert update[UPDATE].value == pytest.approx(float(update["tokens of a step"].value) / np.median(update[UPDATE].series))
    told = {line.what: line.value for line in lines(found) if line.part == "" or line.part.startswith("loss simulated")}
    assert 0 < float(told["loss beside bfloat16's"].split()[0]) < 0.01


def test_the_kernel_and_its_floors(tmp_path: Path) -> None:
    outcome = tried("logprobs", tmp_path)
    assert outcome.state == "done" and outcome.good
    # 3 tokens, 5 words, 7 wide: inputs once forward; twice, and gradients once, with a backward pass.
    inputs, logits, products = 2 * (3 * 7 + 5 * 7), 4 * 3 * 5, 2 * 3 * 5 * 7
    size = kernels.Size(3, 5, 7, 1)
    assert kernels.work(size, backward=False) == (inputs + 12 * 3, inputs + 12 * 3 + 2 * logits, products)
    both = 3 * inputs + 2 * 12 * 3
    assert kernels.work(size, backward=True) == (both, both + 4 * logits, 4 * products)


def test_settings_that_cannot_keep_the_promise_are_refused(tmp_path: Path) -> None:
    (finding,) = tried("ratio te-delayed", tmp_path).findings
    assert "delayed" in str(finding.value)


def test_what_is_not_here_is_skipped_with_the_reason(tmp_path: Path) -> None:
    assert tried("equal float32", tmp_path).reason.startswith(f"{REFERENCE} is not in")
    missing = replace(PARTS["ceilings"], packages=("torch", "no_such_package", "no_such.package"))
    perform(missing, tmp_path, smoke=True)
    light = "machine:environment"  # should it be tried after all
    perform(replace(PARTS["ratio bfloat16"], work=light), tmp_path, smoke=False)
    outcomes = read_results([tmp_path])
    assert outcomes["ceilings"].reason == "not installed here: no_such_package, no_such.package"
    assert outcomes["ratio bfloat16"].reason == "there is no GPU here: torch sees none"
    assert {outcome.state for outcome in outcomes.values()} == {"skipped"}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_there_and_explained(name: str) -> None:
    module, _, function = PARTS[name].work.partition(":")
    assert callable(getattr(importlib.import_module(f"tools.gpu_acceptance.{module}"), function))
    assert f"| `{name.split()[0]}" in PAGE.read_text(encoding="utf-8"), f"docs/gpu.md does not say what {name} is"


def test_sequences_have_a_pattern_to_learn() -> None:
    given = models.sequences(models.TINY, seed=0, pattern=True)
    tokens = [(int(a), int(b)) for sequence in given for a, b in itertools.pairwise(sequence.tokens)]
    assert 0.8 < np.mean([(5 * a + 1) % 251 == b for a, b in tokens]) < 1.0


# -- the runner ------------------------------------------------------------------------------------------------------------


def test_the_program_runs_what_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--smoke", "--only", "environment", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as first:
        main(words)
    assert not first.value.code and "[1 of 1] environment" in capsys.readouterr().out
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(SystemExit):
        main(words)
    assert (tmp_path / FILE).read_bytes() == before and "megatron-core" in capsys.readouterr().out
    assert todo(chosen(["environment"]), tmp_path, again=True) == [PARTS["environment"]]
    with pytest.raises(SystemExit, match="of a smoke test"):
        main(["--only", "environment", "--out", str(tmp_path)])
    main(["--table", str(tmp_path), "--markdown"])
    assert "| environment | system |" in capsys.readouterr().out


def test_a_part_has_its_time_and_no_more(tmp_path: Path) -> None:
    ended = run_part(replace(PARTS["environment"], limit=0), tmp_path, smoke=True)
    assert (ended.state, "was ended" in ended.reason) == ("failed", True)
    assert [part.name for part in todo(chosen(["environment"]), tmp_path, again=False)] == ["environment"]
    short = run_part(PARTS["environment"], tmp_path, smoke=True, seconds=0.0)
    assert short.state == "interrupted"
    died = run_part(replace(PARTS["environment"], name="no such part"), tmp_path, smoke=True)
    assert died.state == "failed" and "without a word" in died.reason
    assert [part.name for part in todo(chosen(["environment"]), tmp_path, again=False)] == ["environment"]


def test_a_broken_promise_ends_with_an_error(results: Results) -> None:
    """Of the parts that were asked for."""
    for part, value in (("environment", 0.0), ("ceilings", 1.0)):
        results.begin(part, smoke=True)
        results.add(part, Finding("ratio", value, bound=0.5))
        results.end(part, "done", smoke=True)
    for asked, code in ((["environment"], 0), (["environment", "ceilings"], 1)):
        with pytest.raises(SystemExit) as ended:
            main(["--smoke", "--out", str(results.folder), *(word for part in asked for word in ("--only", part))])
        assert int(ended.value.code or 0) == code


def test_no_part_is_begun_that_will_hardly_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its guessed time counts at full size, seconds at a tiny one; what never fits is told what it takes."""
    for minutes, smoke, told in (("0.3", True, "Give it --minutes 2"), ("0.34", False, "Give it --minutes 3")):
        words = ["--only", "reference", "--minutes", minutes, "--out", str(tmp_path / minutes), *(["--smoke"] if smoke else [])]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code and not (tmp_path / minutes).exists()
        assert "reference: not begun" in (said := capsys.readouterr().out) and told in said, said


def test_parts_are_chosen_by_whole_words() -> None:
    assert [part.name for part in chosen(["loss bfloat16", "ceilings"])] == ["ceilings", "loss bfloat16"]
    assert [part.name for part in chosen(["layout tensor"])] == ["reference", "layout tensor"], "what it reads comes along"
    assert len(chosen(["ratio"])) == 9 and chosen(None) == list(PARTS.values())
    with pytest.raises(SystemExit, match="no part's name begins so"):
        chosen(["rat"])


# -- what is written down --------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Results]:
    yield Results(tmp_path)


def test_results_outlive_a_kill(results: Results) -> None:
    results.begin("ceilings", smoke=False)
    results.add("ceilings", Finding("copy", 3000.0, "GB/s"))
    assert results.read()["ceilings"].state == "interrupted" and results.read()["ceilings"].findings[0].value == 3000.0
    with open(results.path, "a") as file:
        file.write('{"line": "finding", "part": "ceil')
    results.end("ceilings", "done", where="a GPU")
    assert (results.read()["ceilings"].state, len(results.read()["ceilings"].findings)) == ("done", 1)
    results.begin("ceilings", smoke=False)
    results.end("ceilings", "failed", reason="no memory")
    assert results.read()["ceilings"].findings == () and not results.read()["ceilings"].good


def test_folders_are_read_together_and_the_later_word_counts(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        written = Results(tmp_path / name)
        written.begin("ceilings", smoke=False)
        written.add("ceilings", Finding("copy", value))
        written.end("ceilings", "done")
    found = read_results([tmp_path / "one", tmp_path / "two"])
    assert values(found["ceilings"]) == {"copy": 2.0}


@pytest.mark.parametrize(("value", "kept"), [(0.0, True), (0.1, True), (0.2, False), (float("nan"), False), ("0.0", False)])
def test_a_promise_is_kept_within_its_bound(value: float | str, kept: bool) -> None:
    assert Finding("ratio", value, bound=0.1).kept is kept
    assert Finding("ratio", value).kept is None


def test_formats_are_compared_with_bfloat16_in_the_same_layers_on_the_same_gpu() -> None:
    def outcome(part: str, where: str, *findings: Finding) -> Outcome:
        return Outcome(part, "done", where=where, findings=findings)

    losses = Finding(LOSSES, 2.0, series=(4.0, 2.0))
    given = {
        each.part: each
        for each in (
            outcome("update bfloat16", "H", Finding(UPDATE, 10.0)),
            outcome("update te-bfloat16", "H", Finding(UPDATE, 100.0)),
            outcome("update te-blockwise", "H", Finding(UPDATE, 150.0)),
            outcome("update te-tensorwise", "another", Finding(UPDATE, 130.0)),
            outcome("loss te-bfloat16", "H", losses),
            outcome("loss te-blockwise", "H", Finding(LOSSES, 2.1, series=(4.0, 2.1))),
        )
    }
    told = [(line.what, line.value) for line in lines(given) if "bfloat16" in line.value or "beside" in line.what]
    assert told[0][1] == "1.5 times bfloat16's" and len(told) == 3
    assert [value.split()[0] for _, value in told[1:]] == ["0.05", "0.025"]
    assert "smoke" not in as_markdown(given)
    assert "its times mean nothing" in as_markdown({name: replace(each, smoke=True) for name, each in given.items()})


def test_lines_are_json(results: Results) -> None:
    results.begin("ceilings", smoke=True)
    results.add("ceilings", Finding("copy", 1.0, series=(1.0, 2.0)))
    assert [json.loads(line)["line"] for line in results.path.read_text().splitlines()] == ["begin", "finding"]

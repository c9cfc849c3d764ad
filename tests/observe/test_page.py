"""The page's data: true to the run, of bounded size, and safe whatever the model said."""

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.errors import DataError
from megatron_rl.observe.charts import charts
from megatron_rl.observe.journal import Journal
from megatron_rl.observe.page import MOST_CELLS, MOST_COLUMNS, MOST_POINTS, as_json, page_data, render
from megatron_rl.observe.reading import RunReader
from megatron_rl.observe.records import StepRecord
from megatron_rl.observe.samples import Bounds, SampleBrowser, bank_of
from megatron_rl.rollout.bank.reader import BankReader
from tests.observe.runs import MadeRun, metrics, run_record
from tests.observe.said import ASKED, EVIL, GROUP_SIZE, SAID, write_bank, write_run

NO_BANK = SampleBrowser(None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bank, whose steps are of many row groups as large ones are; tests only read it."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_rl.rollout.bank.sealed.ROW_GROUP_BYTES", 1)
        write_run(folder / "run", folder / "tokenizer", steps=6)
    return folder / "run"


def data_of(directory: Path, **changes: Any) -> dict[str, Any]:
    """What the page would show, having been through JSON as it will."""
    reader = RunReader(directory)
    browser = replace(SampleBrowser(bank_of(reader)), **changes)
    found: dict[str, Any] = json.loads(as_json(page_data(reader, browser)))
    return found


# -- what can stand in a page ------------------------------------------------------------------------------------------


@given(st.recursive(st.text() | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_text_is_data_and_never_markup(value: Any) -> None:
    text = as_json({"value": value})
    assert json.loads(text) == {"value": value}
    assert not re.search("[<>&\u2028\u2029]", text) and text.isascii()


def test_the_page_holds_all_and_allows_nothing_else(run: Path) -> None:
    """One script and one style may run, by their hashes; nothing is fetched; the data comes out as it went in."""
    reader = RunReader(run)
    data = page_data(reader, SampleBrowser(bank_of(reader)))
    page = render(data)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    styles = re.findall(r"<style>(.*?)</style>", page, re.S)
    for kind, parts in (("script", scripts), ("style", styles)):
        (part,) = parts
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(inside) == json.loads(json.dumps(data))
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page and EVIL not in page
    assert html.unescape(page).count("<script") == 2


# -- curves ------------------------------------------------------------------------------------------------------------


def test_every_metric_is_drawn_in_one_chart(run: Path) -> None:
    data = data_of(run)
    drawn = [series["name"] for panel in data["charts"].values() for chart in panel for series in chart["series"]]
    assert sorted(drawn) == sorted(metrics(0, np.random.default_rng(0)))
    for name, values in data["curves"]["named"].items():
        expected = [MadeRun().record(step, 6).metrics[name] for step in range(6)]
        assert values["mean"] == pytest.approx(expected, rel=1e-5)


def test_names_that_nobody_knows_get_a_chart_each() -> None:
    found = charts(["mine/x", "reward/mean", "reward/style", "loss"])
    assert [chart["title"] for chart in found["others"]] == ["mine/x"]
    assert [series["name"] for series in found["learning"][0]["series"]] == ["reward/mean", "reward/style"]


def test_a_long_run_becomes_means_with_their_range(tmp_path: Path) -> None:
    """Not a spike is lost: the smallest and largest of all steps are in the page."""
    journal = Journal(tmp_path)
    journal.started(run_record(2500), 0)
    values = np.random.default_rng(1).normal(size=2500)
    values[[3, 1999]] = np.nan
    for step, value in enumerate(values.tolist()):
        journal.step(StepRecord(step, {"loss": value}))
    curves = data_of(tmp_path)["curves"]
    found = curves["named"]["loss"]
    assert curves["apart"] == 3 and len(curves["steps"]) == len(found["mean"]) <= MOST_POINTS
    assert curves["steps"][:2] == [2, 5] and curves["steps"][-1] == 2499
    parts = [values[start : start + 3] for start in range(0, 2500, 3)]
    for name, reduce in (("mean", np.nanmean), ("low", np.nanmin), ("high", np.nanmax)):
        assert found[name] == pytest.approx([float(reduce(part)) for part in parts], rel=1e-5)


def test_the_size_of_the_page_is_bounded(tmp_path: Path) -> None:
    """A model of 94 layers with 128 experts, and many steps: megabytes, not gigabytes."""
    MadeRun(layers=94, experts=128, evaluate_every=50).tell(Journal(tmp_path), 0, 150)
    data = data_of(tmp_path)
    experts = data["experts"]
    assert experts["steps"][-1] == 149 and len(experts["steps"]) <= MOST_COLUMNS
    assert len(base64.b64decode(experts["cells"])) == len(experts["steps"]) * 94 * 128 <= MOST_CELLS
    assert len(as_json(data)) < 4e6


def test_the_heat_map_is_tokens_over_the_mean_of_the_layer(run: Path) -> None:
    experts = data_of(run)["experts"]
    cells = np.frombuffer(base64.b64decode(experts["cells"]), np.uint8).reshape(6, 4, 16)
    for at, step in enumerate(experts["steps"]):
        tokens = MadeRun().record(step, 6).expert_tokens
        assert tokens is not None
        load = tokens / tokens.mean(axis=1, keepdims=True)
        assert cells[at] / 255 * experts["largest"] == pytest.approx(load, abs=experts["largest"] / 500)
        assert [layer[at] for layer in experts["fullest"]] == pytest.approx(load.max(axis=1), rel=1e-4)


def test_phases_are_shown_as_they_were_timed(run: Path) -> None:
    timeline = data_of(run)["timeline"]
    assert [step["step"] for step in timeline["steps"]] == list(range(6))
    for step in timeline["steps"]:
        expected = MadeRun().record(step["step"], 6).spans
        begin = min(span.start for span in expected)
        assert step["spans"] == [[span.name, span.lane, span.start - begin, span.stop - begin] for span in expected]
    assert timeline["overview"]["named"]["update"]["mean"] == [5.5] * 6


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_what_was_said_joined_to_what_was_learned(run: Path) -> None:
    """Against the bank read by itself and the traces as they were told: every token in its place."""
    groups = data_of(run)["samples"]["groups"]
    assert [group["step"] for group in groups] == [5, 5, 4, 4, 3, 3]  # the newest first
    reader = RunReader(run)
    with BankReader(run / "bank") as bank:
        for group in groups:
            with bank.step(group["step"]) as sealed:
                kept = {each.key: each for each in sealed.groups()}[group["key"]]
            traces = {trace["row"]: trace for trace in reader.traces(group["step"]) if trace["group"] == group["key"]}
            assert group["prompt"] == ASKED[int(group["key"].split("/")[1][0])] and group["size"] == GROUP_SIZE
            for shown, sample, row in zip(group["samples"], kept.samples, sorted(traces), strict=True):
                start, trace = sample.prompt_length, traces[row]
                assert shown["ids"] == sample.tokens[start:].tolist()
                assert "".join(shown["pieces"]) == SAID[shown["index"]]
                assert shown["log_probs"] == pytest.approx(sample.log_probs[start:], abs=6e-4)
                assert shown["log_ratio"] == pytest.approx(trace["log_ratio"][start:], abs=6e-6)
                assert (shown["reward"], shown["rewards"]) == (sample.reward, dict(sample.rewards))
                assert (shown["clipped"], shown["ratio"]) == (trace["clipped"], pytest.approx(trace["ratio"], abs=1e-8))
                own = trace["token_advantage"]
                assert shown["token_advantage"] == (None if own is None else pytest.approx(own[start:], abs=6e-5))
    fifth = groups[0]["samples"][4]
    assert [author for _, _, author, _ in fifth["authors"]] == ["p", "e", "p"] and fifth["authors"][-1][1] == fifth["length"]
    assert groups[0]["samples"][1]["versions"] == [5, 6] and "30 s" in groups[0]["samples"][5]["failure"]


def test_what_is_shown_is_bounded(run: Path) -> None:
    groups = data_of(run, bounds=Bounds(groups=3, samples=2, tokens=20))["samples"]["groups"]
    assert len(groups) == 3 and all(len(group["samples"]) == 2 and group["size"] == GROUP_SIZE for group in groups)
    first = groups[0]["samples"][0]
    assert len(first["ids"]) == len(first["pieces"]) == len(first["log_ratio"]) == 20 < first["length"]
    assert data_of(run, bounds=Bounds(letters=7))["samples"]["groups"][0]["prompt"].startswith(f"{ASKED[0][:7]} … and ")
    few = data_of(run, bounds=Bounds(all_tokens=1))["samples"]["groups"]
    assert len(few) == 1  # one is always shown


def test_without_a_tokenizer_ids_and_kept_texts_are_shown(tmp_path: Path) -> None:
    traced = write_bank(tmp_path / "run/bank", tmp_path / "tokenizer", range(2), note=False)
    MadeRun(traced=traced).tell(Journal(tmp_path / "run"), 0, 2)
    samples = data_of(tmp_path / "run")["samples"]
    assert "names no tokenizer" in samples["note"]
    first = samples["groups"][0]["samples"][2]
    assert first["pieces"] is None and first["text"] == SAID[2]
    named = data_of(tmp_path / "run", tokenizer_name=str(tmp_path / "tokenizer"))["samples"]
    assert named["note"] == "" and "".join(named["groups"][0]["samples"][2]["pieces"]) == SAID[2]
    with pytest.raises(DataError, match=r"--tokenizer .*no tokenizer can be loaded"):
        data_of(tmp_path / "run", tokenizer_name=str(tmp_path / "run"))


def test_a_bank_without_traces_shows_its_newest_step(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "tokenizer", made=MadeRun(traced=[[]] * 6), steps=6)
    write_bank(tmp_path / "run/bank", tmp_path / "tokenizer", range(2))
    samples = data_of(tmp_path / "run")["samples"]
    assert "No groups are traced (observe.traces)" in samples["note"]
    assert [(group["step"], group["traced"]) for group in samples["groups"]] == [(1, False)] * 2
    assert "log_ratio" not in samples["groups"][0]["samples"][0]


def test_a_dense_run_that_has_only_begun_says_what_is_missing(tmp_path: Path) -> None:
    Journal(tmp_path).started(run_record(), 0)
    data = data_of(tmp_path)
    assert data["experts"] is None and data["evaluations"] == [] and data["last"] == {"step": None, "time": None}
    assert data["samples"]["groups"] == [] and "There is no bank" in data["samples"]["note"]
    render(data)


def test_the_bank_is_found_where_the_settings_put_it(tmp_path: Path) -> None:
    Journal(tmp_path).started(run_record(settings=f"bank: {{directory: {tmp_path}/elsewhere}}\n"), 0)
    assert bank_of(RunReader(tmp_path)) == tmp_path / "elsewhere"
    (tmp_path / "bank").mkdir()
    assert bank_of(RunReader(tmp_path)) == tmp_path / "bank"


def test_the_next_page_finds_new_groups_and_forgets_none(run: Path, tmp_path: Path) -> None:
    """What was prepared for a page is used again for the next: the same as preparing all anew."""
    traced = write_bank(tmp_path / "run/bank", tmp_path / "tokenizer", range(2))
    made = MadeRun(traced=traced)
    journal = Journal(tmp_path / "run")
    journal.started(run_record(), 0)
    reader = RunReader(tmp_path / "run")
    browser = SampleBrowser(bank_of(reader))
    for step in range(2):
        journal.step(made.record(step, 2))
        reader.refresh()
        found = browser.shown(reader)
        assert [group["step"] for group in found["groups"]] == [at for at in range(step, -1, -1) for _ in ASKED]
        assert found == SampleBrowser(bank_of(reader)).shown(RunReader(tmp_path / "run"))

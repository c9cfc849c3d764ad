"""The page in a real browser: it draws everything, obeys the keyboard, fits a telephone, renews itself, and runs no text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.observe.journal import Journal
from megatron_rl.observe.page import write_page
from megatron_rl.observe.reading import RunReader
from megatron_rl.observe.samples import SampleBrowser, bank_of
from tests.observe.browser import Browser, Page
from tests.observe.runs import MadeRun, run_record
from tests.observe.said import GROUP_SIZE, SAID, write_bank, write_run

# Panel, and what of the focus can be seen: an outline of the element, of what follows it, a frame of what is in it.
WHERE_THE_FOCUS_IS = """(() => {
    const own = document.activeElement, next = own.nextElementSibling, inside = own.querySelector?.("rect");
    const panel = own.closest("section, nav, header");
    return [panel?.id || panel?.tagName || own.tagName, getComputedStyle(own).outlineStyle,
        next ? getComputedStyle(next).outlineStyle : "none", inside ? getComputedStyle(inside).strokeWidth : "0"];
})()"""
BEYOND_THE_EDGE = """[...document.querySelectorAll('main *, header *, nav *')].filter((each) => {
    const box = each.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !each.closest('.scroll, nav ul, .tokens, pre, svg');
}).map((each) => each.outerHTML.slice(0, 80))"""
PANELS = ["learning", "evaluation", "samples", "mismatch", "experts", "time", "run"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything in it."""
    folder = tmp_path_factory.mktemp("written")
    write_run(folder / "run", folder / "tokenizer")
    return page_of(folder / "run")


def page_of(directory: Path, refresh: float | None = None) -> Path:
    reader = RunReader(directory)
    write_page(reader, SampleBrowser(bank_of(reader)), directory / "report.html", refresh)
    return directory / "report.html"


def opened(browser: Browser, path: Path, width: int = 1280, **options: Any) -> Page:
    page = browser.open(path.as_uri(), width, **options)
    assert page.complaints == []
    return page


def chosen(page: Page) -> int:
    """Which response is chosen."""
    found: int = page.evaluate("[...document.querySelectorAll('.card')].findIndex((card) => card.dataset.chosen !== undefined)")
    return found


def test_every_panel_is_drawn(browser: Browser, written: Path) -> None:
    page = opened(browser, written)
    assert page.evaluate("[...document.querySelectorAll('main > section')].map((each) => each.id)") == PANELS
    assert page.evaluate("[...document.querySelectorAll('h2')].every((each) => each.textContent.length > 2)")
    page.until("[...document.querySelectorAll('.plot')].every((plot) => plot.closest('details') || plot.querySelector('svg'))")
    lines = "[...document.querySelectorAll('#learning .plot')].filter((each) => each.querySelector('path.line')).length"
    assert page.evaluate(lines) >= 10
    assert page.evaluate("document.querySelectorAll('#gantt .phase').length") == 6
    assert page.evaluate("document.querySelectorAll('.missing').length") == 0
    painted = """(() => { const heat = document.getElementById("heat"), pen = heat.getContext("2d");
        return new Set(pen.getImageData(0, 10, heat.width, 1).data).size; })()"""
    assert page.evaluate(painted) > 20  # many colours
    assert page.evaluate("document.querySelectorAll('.card').length") == GROUP_SIZE
    assert page.evaluate("document.querySelectorAll('.card.clipped').length") == 2
    assert page.complaints == []


def test_pictures_have_texts_and_numbers_explain_themselves(browser: Browser, written: Path) -> None:
    page = opened(browser, written)
    names = page.evaluate("[...document.querySelectorAll('[role=img]')].map((each) => each.getAttribute('aria-label'))")
    assert len(names) > 15 and all(name and len(name) > 10 for name in names)
    reward = next(name for name in names if name.startswith("Reward."))
    assert "reward: 0.102 at step 0, 0.791 at step 39" in reward
    silent = page.evaluate("[...document.querySelectorAll('.tile, .legend li, .card dd')].filter((each) => "
                           "!each.closest('[data-tip]')).map((each) => each.textContent)")  # fmt: skip
    assert [text for text in silent if text not in ("sample", "update", "old", "score", "publish", "wait")] == []
    page.evaluate("document.querySelector('.tile').focus()")
    assert page.evaluate("document.getElementById('tip').textContent").startswith("Mean reward of the step's samples")
    assert page.evaluate("!document.getElementById('tip').hidden")


def test_untrusted_text_stays_text(browser: Browser, written: Path) -> None:
    """Nothing that a response says becomes part of the page, and no alert opens, which would hang it."""
    page = opened(browser, written)
    shown = page.evaluate("[...document.querySelectorAll('.card .tokens')].map((each) => each.textContent)")
    assert [text.replace("\u200b", "") for text in shown] == list(SAID)
    assert "<script>alert(1)</script>" in shown[2]
    assert page.evaluate("document.querySelectorAll('main script, main img, main iframe, [onerror]').length") == 0
    assert page.evaluate("document.scripts.length") == 2
    assert page.complaints == []


def test_the_browsers_own_guard_holds_where_the_page_would_not(browser: Browser, written: Path) -> None:
    """Even text that came in as markup could not run: the page's policy allows its own script alone."""
    page = opened(browser, written)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.harmed = 1\">')")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.harmed = 2'}))")
    page.evaluate("new Promise((done) => setTimeout(done, 200))")  # as long as a handler would have taken
    assert page.evaluate("window.harmed") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_arrow_keys_move_between_responses_groups_and_tokens(browser: Browser, written: Path) -> None:
    page = opened(browser, written)
    page.evaluate("document.querySelector('.card').focus()")
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", GROUP_SIZE - 1),
        ("ArrowRight", 5),
        ("Home", 0),
    ):
        page.press(key)
        assert chosen(page) == place
        assert page.evaluate("document.activeElement.dataset.chosen") == ""
    title = "document.getElementById('group').selectedOptions[0].textContent"
    first = page.evaluate(title)
    page.press("ArrowDown")
    second = page.evaluate(title)
    assert first.startswith("step 39 · task:arithmetic/0#39") and second.startswith("step 39 · task:arithmetic/1#39")
    page.press("ArrowRight")
    page.press(".")
    page.press(".")
    told = page.evaluate("document.getElementById('token').textContent")
    assert told.startswith("token 1, id ") and "log-ratio new − old" in told and "drawn with" in told
    page.press("ArrowUp")
    assert page.evaluate(title) == first
    assert "sample" not in page.evaluate("location.hash")
    page.press("ArrowRight")
    assert "sample=1" in page.evaluate("location.hash")


def test_the_tab_key_reaches_everything_and_shows_where_it_is(browser: Browser, written: Path) -> None:
    page = opened(browser, written)
    seen: list[str] = []
    for _ in range(300):
        page.press("Tab")
        here = page.evaluate(WHERE_THE_FOCUS_IS)
        if here[0] == "BODY":
            break
        seen.append(here[0])
        assert here[1] != "none" or here[2] != "none" or here[3] == "2px", here
    order = list(dict.fromkeys(seen))
    assert order == ["HEADER", "NAV", *PANELS]


def test_curves_are_read_step_by_step_and_smoothed(browser: Browser, written: Path) -> None:
    page = opened(browser, written)
    page.until("document.querySelector('#learning .plot path.line')")
    page.evaluate("document.querySelector('#learning .plot').focus()")
    page.press("Home")
    assert page.evaluate("document.querySelector('#learning .readout').textContent") == "step 0"
    assert page.evaluate("document.querySelector('#learning .legend b').textContent") == "0.102"
    strong = "document.querySelector('#learning path.line.c0:not(.raw)').getAttribute('d')"
    before = page.evaluate(strong)
    page.evaluate(
        "(() => { const own = document.getElementById('smooth'); own.value = 0; own.dispatchEvent(new Event('input')); })()"
    )
    assert page.evaluate(strong) != before and page.evaluate("document.querySelectorAll('#learning path.raw').length") == 0
    assert "smooth=0" in page.evaluate("location.hash")


def test_one_layer_of_the_heat_map(browser: Browser, written: Path) -> None:
    page = opened(browser, written)
    page.evaluate("document.getElementById('heat').focus()")
    page.press("ArrowDown")
    page.press("Enter")
    assert page.evaluate("document.getElementById('layer').value") == "1"
    page.press("ArrowDown")
    page.press("ArrowLeft")
    said = page.evaluate("document.querySelector('#experts .readout').textContent")
    tokens = MadeRun().record(38, 40).expert_tokens
    assert tokens is not None
    assert said == f"step 38, expert 1 {tokens[1][1] / tokens[1].mean():.2f} × its fair share of tokens"


@pytest.mark.parametrize("width", [400, 320])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_screen_scrolls_down_alone(browser: Browser, written: Path, width: int, dark: bool) -> None:
    page = opened(browser, written, width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.until("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('svg'))")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(BEYOND_THE_EDGE) == []
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, light[4:-1].split(","))) < 60) == dark
    assert page.complaints == []


def test_a_page_that_is_renewed_keeps_its_place(browser: Browser, tmp_path: Path) -> None:
    traced = write_bank(tmp_path / "run/bank", tmp_path / "tokenizer", range(8))
    made, journal = MadeRun(traced=traced), Journal(tmp_path / "run")
    journal.started(run_record(8), 0)
    for step in range(4):
        journal.step(made.record(step, 8))
    page = opened(browser, page_of(tmp_path / "run", refresh=1.0))
    page.evaluate("document.getElementById('colour-advantage').click()")
    page.evaluate("document.querySelector('.card').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.press(key)
    page.evaluate("document.getElementById('settings').open = true")
    page.evaluate("scrollTo(0, 700)")
    before = page.evaluate("[document.getElementById('group').selectedOptions[0].textContent, scrollY]")
    page.evaluate("window.old = true")
    journal.step(made.record(4, 8))
    page_of(tmp_path / "run", refresh=1.0)
    renewed = "window.old === undefined && document.body?.dataset.ready === '' && data.last.step === 4"
    page.until(f"{renewed} && (document.getElementById('renewal').click(), true)")  # which stays as it is from here on
    page.until("scrollY === 700")
    assert page.evaluate("[document.getElementById('group').selectedOptions[0].textContent, scrollY]") == before
    assert page.evaluate("document.querySelector('[name=colour]:checked').value") == "advantage"
    assert chosen(page) == 2 and page.evaluate("document.activeElement.id") == "response-2"
    assert page.evaluate("document.getElementById('settings').open")
    assert "paused=1" in page.evaluate("location.hash")
    assert page.complaints == []


def test_what_is_missing_is_said_in_sentences(browser: Browser, tmp_path: Path) -> None:
    Journal(tmp_path).started(run_record(), 0)
    page = opened(browser, page_of(tmp_path))
    said = page.evaluate(
        "[...document.querySelectorAll('.missing')].map((each) => [each.closest('section')?.id, each.textContent])"
    )
    assert {place for place, _ in said} == {None, "learning", "evaluation", "samples", "mismatch", "experts", "time"}
    assert all(len(text) > 20 and text.endswith(".") for _, text in said)
    assert page.complaints == []


def test_a_dense_model_and_ids_for_tokens(browser: Browser, tmp_path: Path) -> None:
    traced = write_bank(tmp_path / "run/bank", tmp_path / "tokenizer", range(2), note=False)
    MadeRun(experts=0, traced=traced).tell(Journal(tmp_path / "run"), 0, 2)
    page = opened(browser, page_of(tmp_path / "run"))
    assert "the model is dense" in page.evaluate("document.querySelector('#experts .missing').textContent")
    assert "names no tokenizer" in page.evaluate("document.querySelector('#samples .missing').textContent")
    assert page.evaluate("document.querySelector('.tokens').textContent").split()[0].isdigit()
    assert page.evaluate("document.querySelector('.card pre').textContent") == SAID[0]
    assert page.complaints == []

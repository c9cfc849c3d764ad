"""docs/clusters.md: its tables are those that are made now, and the model is as near to published runs as the page says."""

import statistics

from tools.plan_docs import PAGE, text
from tools.plan_published import RUNS, SERVED


def test_the_tables_are_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(), "run `python tools/plan_docs.py`"


def test_published_runs_are_met_as_the_page_says() -> None:
    others = [abs(run.error) for run in RUNS if not run.fitted]
    assert statistics.median(others) < 0.12
    assert max(others) < 0.8
    assert max(abs(run.error) for run in SERVED) < 0.3

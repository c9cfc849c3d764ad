"""`megatron-rl report`: writes a page, follows a run to its end, and says what is wrong."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from megatron_rl.cli import app
from megatron_rl.observe.journal import Journal
from tests.observe.runs import MadeRun, run_record, wait_for

REPOSITORY = Path(__file__).parents[2]


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def data_in(page: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text(), re.S)[0])
    return found


def test_a_page_is_written_into_the_run_or_where_one_says(tmp_path: Path) -> None:
    MadeRun().tell(Journal(tmp_path / "run"), 0, 3)
    result = report(tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert re.search(r"report\.html: \d+\.\d MB", result.output.replace("\n", ""))
    assert data_in(tmp_path / "run/report.html")["last"]["step"] == 2
    assert report(tmp_path / "run", "--to", tmp_path / "mine.html").exit_code == 0
    assert data_in(tmp_path / "mine.html")["title"] == "run"
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    result = report(tmp_path)
    assert result.exit_code == 2 and "error: " in result.stderr and "is no run's directory" in result.stderr
    Journal(tmp_path).started(run_record(), 0)
    result = report(tmp_path, "--to", tmp_path / "nowhere/page.html")
    assert result.exit_code == 2 and "is not a folder. Make it first." in result.stderr


def test_a_watched_page_follows_the_run_to_its_end(tmp_path: Path) -> None:
    made, journal = MadeRun(), Journal(tmp_path)
    journal.started(run_record(4), 0)
    command = [sys.executable, "-m", "megatron_rl.cli", "report", str(tmp_path), "--watch", "--every", "1"]
    watcher = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        page = tmp_path / "report.html"
        wait_for(page, 60)
        assert data_in(page)["refresh"] == 1.0
        for step in range(4):
            journal.step(made.record(step, 4))
            deadline = time.monotonic() + 60
            while data_in(page)["last"]["step"] != step:  # whole whenever it is read
                assert time.monotonic() < deadline and watcher.poll() is None
                time.sleep(0.05)
        journal.finished()
        output, _ = watcher.communicate(timeout=60)
    finally:
        watcher.kill()
    assert watcher.returncode == 0 and "the run has come to its end" in output
    assert data_in(page)["refresh"] is None

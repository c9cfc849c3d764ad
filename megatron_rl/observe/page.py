"""The report: a run as one page that needs nothing but itself. docs/report.md says what each panel tells."""

import base64
import hashlib
import json
import math
import time
from collections.abc import Sequence
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rl import __version__
from megatron_rl.observe.charts import HEADLINES, charts
from megatron_rl.observe.reading import RunReader, Table
from megatron_rl.observe.samples import SampleBrowser
from megatron_rl.observe.vocabulary import meaning
from megatron_rl.rollout.bank import files

MOST_POINTS = 1000  # of a curve; beyond that a point is the mean of several steps, with their range
MOST_BARS = 120  # of the overview of phases
MOST_SPAN_STEPS = 60  # whose phases are drawn one by one
MOST_COLUMNS = 60  # steps of the heat map
MOST_CELLS = 1_500_000  # of the heat map, a byte each
DIGITS = 6  # significant, of a number in the page
SCRIPTS = ("tools", "charts", "timeline", "experts", "samples", "page")


def write_page(run: RunReader, samples: SampleBrowser, target: Path, refresh: float | None = None) -> None:
    """Write the page, whole or not at all. With `refresh` it loads itself again after so many seconds."""
    files.write_file(target, render(page_data(run, samples, refresh)).encode())


def page_data(run: RunReader, samples: SampleBrowser, refresh: float | None = None) -> dict[str, Any]:
    """Everything that the page shows, in plain values of bounded size."""
    names = run.metrics.names
    return {
        "program": f"megatron-rl {__version__}",
        "written": time.time(),
        "refresh": refresh,
        "title": run.folder.path.resolve().name,
        "directory": str(run.folder.path),
        "run": run.start,
        "starts": [{name: start[name] for name in ("started", "step", "finished", "host")} for start in run.starts],
        "last": {"step": run.last_step, "time": float(run.times.column("time")[-1]) if run.last_step is not None else None},
        "headlines": [{"name": name, **vars(meaning(name))} for name in HEADLINES if name in names],
        "charts": charts(names),
        "curves": _curves(run.metrics, MOST_POINTS),
        "evaluations": _evaluations(run),
        "timeline": {"steps": _spans(run), "overview": _curves(run.phases, MOST_BARS)},
        "experts": _experts(run),
        "samples": samples.shown(run),
    }


def render(data: dict[str, Any]) -> str:
    """The page. Its policy lets the browser run this script and no other, and fetch nothing."""
    script, style = _script(), _asset("page.css")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'"
    page = _asset("page.html").replace("@POLICY@", policy).replace("@STYLE@", style).replace("@SCRIPT@", script)
    return page.replace("@DATA@", as_json(data), 1)  # last, and once: data may contain anything


def as_json(data: dict[str, Any]) -> str:
    """Data that can stand in a page: whatever a text contains, it neither ends the element nor begins another."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII: the line separators of Unicode are escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _script() -> str:
    return "\n".join(['"use strict";', *(_asset(f"{name}.js") for name in SCRIPTS)])


def _asset(name: str) -> str:
    return package_files("megatron_rl.observe").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# -- curves ------------------------------------------------------------------------------------------------------------


def _curves(table: Table, most: int) -> dict[str, Any]:
    """All columns; of a long run the mean, smallest and largest of as many steps as make it fit."""
    apart = max(1, math.ceil(len(table.steps) / most))
    named = {}
    for name in table.names:
        values = table.column(name)
        named[name] = {"mean": plain(_by(apart, values, np.nanmean))}
        if apart > 1:
            named[name] |= {"low": plain(_by(apart, values, np.nanmin)), "high": plain(_by(apart, values, np.nanmax))}
    return {"steps": table.steps[apart - 1 :: apart] + _tail(table.steps, apart), "apart": apart, "named": named}


def _tail(steps: Sequence[int], apart: int) -> list[int]:
    return list(steps[-1:]) if len(steps) % apart else []


def _by(apart: int, values: NDArray[np.float64], reduce: Any) -> NDArray[np.float64]:
    """[points] of so many values each, nan where there is none."""
    if apart == 1:
        return values
    padded = np.full(-(-len(values) // apart) * apart, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, apart)
    found = np.full(len(rows), np.nan)
    some = ~np.isnan(rows).all(axis=1)
    found[some] = reduce(rows[some], axis=1)
    return found


def plain(values: NDArray[np.float64]) -> list[float | None]:
    """Numbers with as many digits as can be seen; null for what is not finite."""
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def _evaluations(run: RunReader) -> list[dict[str, Any]]:
    """One entry a held-out set, a curve for each of its numbers."""
    tables: dict[str, Table] = {}
    results: dict[str, str | None] = {}
    for line in sorted(run.evaluations, key=lambda line: line["step"]):
        tables.setdefault(line["name"], Table()).add(line["step"], line["metrics"])
        results[line["name"]] = line["results"]
    return [
        {"name": name, "results": results[name], "metrics": table.names, **_curves(table, MOST_POINTS)}
        for name, table in tables.items()
    ]


# -- time, experts -----------------------------------------------------------------------------------------------------


def _spans(run: RunReader) -> list[dict[str, Any]]:
    """Phases of the newest steps: name, lane, and seconds since the step's first began."""
    found = []
    for line in list(run.spans)[-MOST_SPAN_STEPS:]:
        begin = min((span["start"] for span in line["spans"]), default=0.0)
        times = [(round(span["start"] - begin, 4), round(span["stop"] - begin, 4)) for span in line["spans"]]
        spans = [[span["name"], span["lane"], *own] for span, own in zip(line["spans"], times, strict=True)]
        found.append({"step": line["step"], "begin": begin, "spans": spans})
    return found


def _experts(run: RunReader) -> dict[str, Any] | None:
    """Each expert's tokens over its layer's mean, as bytes: 255 is the largest of all."""
    steps, tokens = run.expert_tokens(MOST_COLUMNS)
    if tokens is None:
        return None
    most = max(1, MOST_CELLS // max(1, tokens[0].size))
    steps, tokens = steps[-most:], tokens[-most:]
    mean = tokens.mean(axis=2, keepdims=True)
    load = np.divide(tokens, mean, out=np.zeros(tokens.shape), where=mean > 0)  # [steps, layers, experts]
    largest = float(load.max()) or 1.0
    cells = np.rint(load / largest * 255).astype(np.uint8)
    return {
        "steps": steps,
        "known": run.expert_steps,
        "layers": tokens.shape[1],
        "experts": tokens.shape[2],
        "largest": largest,
        "fullest": [plain(row) for row in load.max(axis=2).T],  # [layers][steps]
        "cells": base64.b64encode(cells.tobytes()).decode(),
    }

"""The report as one HTML page with pictures drawn in SVG: no script, no font, no file beside it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from megatron_rl.fidelity.report import Report, number
from megatron_rl.fidelity.tokens import Bin, by_position, by_probability, by_routing

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 56
LABELS = 16  # under a picture, at most
FLOOR = 1e-9  # what is less is drawn as this

STYLE = """
:root { --ink: #1c2430; --faint: #66707f; --line: #d5dae2; --paper: #ffffff; --card: #f7f8fa; --blue: #2463b4; --sky: #9cc0ea;
  --red: #c2452d; --green: #2c7a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --faint: #98a3b3; --line: #39424f; --paper: #14181e;
  --card: #1c2129; --blue: #6ea8ee; --sky: #35567f; --red: #ee8168; --green: #6fc692; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 1200px; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.35rem; margin: 0 0 .5rem; } h2 { font-size: 1rem; margin: 0; }
p { margin: .3rem 0; } .faint { color: var(--faint); } .cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow-x: auto; }
.verdict { border-left: 5px solid var(--red); } .verdict.well { border-left-color: var(--green); }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.axis { stroke: var(--line); } .mean { fill: var(--blue); stroke: var(--blue); } .band { fill: var(--sky); }
.limit { stroke: var(--red); stroke-dasharray: 5 4; } .other { fill: var(--red); } .bar { fill: var(--blue); }
svg text.strong { fill: var(--ink); } table { border-collapse: collapse; font-size: 13px; } th, td { text-align: left;
  padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
"""


def page(report: Report) -> str:
    """All of it."""
    first = report.stages[0]
    cards = [
        _card("What takes the difference away", "Mean |Δlogp| with one thing after another made equal; the line is what is "
              "allowed.", _stages(report)),
        _card("By position", "|Δlogp| of tokens by how many stand before them: mean (dot), median to 99th percentile (band). "
              "Growth along the sequence speaks for positions.", _bins(by_position(first.compared), first.tolerance.mean)),
        _card("By the token's probability", "The same by the probability that the server gave the token. Rounding is largest "
              "where tokens are unlikely.", _bins(by_probability(first.compared), first.tolerance.mean)),
    ]  # fmt: skip
    rows = by_routing(first.compared, report.layers)
    if rows:
        text = "Share of tokens predicted with other experts (bars), and mean |Δlogp| where they are the same and others."
        cards.append(_card("By layer: do both choose the same experts?", text, _routing(rows) + _routing_table(rows)))
    cards.append(_card("Both sides", "", _facts(report)))
    notes = "".join(f"<p class='faint'>{escape(note)}</p>" for note in report.notes)
    state = "well" if report.within else ""
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>Policy and server: {escape(report.cause or 'equal')}</title><style>{STYLE}</style>"
        f"<h1>Policy against server, {len(first.compared.difference):,} tokens</h1>"
        f"<div class='card verdict {state}'><p>{escape(report.verdict)}</p>{notes}</div>"
        f"<div class='cards'>{''.join(cards)}</div></html>\n"
    )


def _card(title: str, text: str, body: str) -> str:
    return f"<div class='card'><h2>{escape(title)}</h2><p class='faint'>{escape(text)}</p>{body}</div>"


# -- pictures --------------------------------------------------------------------------------------------------------------


class _Scale:
    """Powers of ten from bottom to top, or from left to right."""

    def __init__(self, values: Iterable[float], low: float, high: float) -> None:
        logs = [math.log10(max(value, FLOOR)) for value in values if math.isfinite(value)] or [0.0]
        self.first, self.last = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        inside = min(max(math.log10(max(value, FLOOR)) if math.isfinite(value) else self.last, self.first), self.last)
        return self.low + (inside - self.first) / (self.last - self.first) * (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        step = max(1, (self.last - self.first) // 6)
        return [(self.at(10.0**power), f"1e{power}") for power in range(self.first, self.last + 1, step)]


def _bins(bins: Sequence[Bin], limit: float) -> str:
    scale = _Scale([value for each in bins for value in (each.mean, each.median, each.p99)] + [limit], HEIGHT - BOTTOM, TOP)
    shapes = [*_grid(scale), _rule(scale.at(limit))]
    width = (WIDTH - LEFT - RIGHT) / max(len(bins), 1)
    half = min(width * 0.3, 24)
    every = -(-len(bins) // LABELS)
    for place, each in enumerate(bins):
        x = LEFT + (place + 0.5) * width
        top, bottom = scale.at(each.p99), scale.at(each.median)
        title = (
            f"{each.name}: {each.tokens} tokens, mean {number(each.mean)}, p99 {number(each.p99)}, largest {number(each.max)}"
        )
        shapes.append(
            f"<g><title>{escape(title)}</title><rect class='band' x='{x - half:.1f}' y='{top:.1f}' "
            f"width='{half * 2:.1f}' height='{max(bottom - top, 1.0):.1f}'/>"
            f"<circle class='mean' cx='{x:.1f}' cy='{scale.at(each.mean):.1f}' r='3.5'/></g>"
        )
        if place % every == 0:
            shapes.append(_below(x, each.name))
    return _svg(shapes, HEIGHT)


def _stages(report: Report) -> str:
    stages = [*report.stages, *report.aside]
    row, names = 34, 130
    height = row * len(stages) + 40
    values = [value for stage in stages for value in (stage.compared.mean, stage.tolerance.mean)]
    scale = _Scale(values, names, WIDTH - 70)
    shapes = []
    for x, text in scale.ticks():
        shapes.append(f"<line class='axis' x1='{x:.1f}' x2='{x:.1f}' y1='6' y2='{height - 26}'/>")
        shapes.append(f"<text x='{x:.1f}' y='{height - 10}' text-anchor='middle'>{text}</text>")
    for place, stage in enumerate(stages):
        y, mean = 10 + place * row, stage.compared.mean
        limit, kind = scale.at(stage.tolerance.mean), "bar" if place < len(report.stages) else "band"
        shapes.append(
            f"<g><title>{escape(stage.text)}</title>"
            f"<text class='strong' x='{names - 8}' y='{y + 15}' text-anchor='end'>{escape(stage.name)}</text>"
            f"<rect class='{kind}' x='{names}' y='{y}' height='20' "
            f"width='{max(scale.at(mean) - names, 1.5):.1f}'/>"
            f"<text x='{scale.at(mean) + 6:.1f}' y='{y + 15}'>{number(mean)}</text>"
            f"<line class='limit' x1='{limit:.1f}' x2='{limit:.1f}' y1='{y - 4}' y2='{y + 24}'/></g>"
        )
    return _svg(shapes, height)


def _routing(rows: Sequence[Mapping[str, float]]) -> str:
    base, most = HEIGHT - BOTTOM, max([row["differs"] for row in rows] + [0.01])
    width, every = (WIDTH - LEFT - RIGHT) / len(rows), -(-len(rows) // LABELS)
    half, shapes = min(width * 0.35, 40), []
    for part in (0.0, 0.5, 1.0):
        y = base - part * (base - TOP)
        shapes.append(f"<line class='axis' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        shapes.append(f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{part * most:.1%}</text>")
    for place, row in enumerate(rows):
        x, height = LEFT + (place + 0.5) * width, row["differs"] / most * (base - TOP)
        shapes.append(
            f"<g><title>layer {row['layer']:.0f}: {row['differs']:.2%} differ</title>"
            f"<rect class='other' x='{x - half:.1f}' y='{base - height:.1f}' width='{half * 2:.1f}' "
            f"height='{height:.1f}'/></g>"
        )
        if place % every == 0:
            shapes.append(_below(x, f"{row['layer']:.0f}"))
    return _svg(shapes, HEIGHT)


def _grid(scale: _Scale) -> list[str]:
    return [
        f"<line class='axis' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>"
        f"<text x='{LEFT - 8}' y='{y + 4:.1f}' text-anchor='end'>{text}</text>"
        for y, text in scale.ticks()
    ]


def _rule(y: float) -> str:
    return f"<line class='limit' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}'><title>allowed mean</title></line>"


def _below(x: float, text: str) -> str:
    y = HEIGHT - BOTTOM + 14
    return f"<text x='{x:.1f}' y='{y}' text-anchor='end' transform='rotate(-35 {x:.1f} {y})'>{escape(text)}</text>"


def _svg(shapes: Sequence[str], height: int) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height}' role='img'>{''.join(shapes)}</svg>"


# -- tables ----------------------------------------------------------------------------------------------------------------


def _routing_table(rows: Sequence[Mapping[str, float]]) -> str:
    if len(rows) > LABELS:
        return ""
    cells = [
        [f"{row['layer']:.0f}", f"{row['differs']:.2%}", *(number(row[k]) if k in row else "" for k in ("same", "other"))]
        for row in rows
    ]
    return _table(["layer", "other experts", "|Δ| same", "|Δ| other"], cells)


def _facts(report: Report) -> str:
    sides: Mapping[str, Mapping[str, Any]] = {"policy": report.policy, "server": report.server}
    cells = [[side, name, str(value)] for side, facts in sides.items() for name, value in facts.items() if value is not None]
    cells += [[side, f"FP8 {kind}", how] for side, kinds in report.quantized.items() for kind, how in kinds.items()]
    cells += [["weights", "differed", name] for name in report.differing]
    return _table(["", "", ""], cells)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"

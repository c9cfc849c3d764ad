"""The table: every finding of every part, and what follows from two parts together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from tools.gpu_acceptance.parts import PARTS
from tools.gpu_acceptance.results import Finding, Outcome

COLUMNS = ("part", "what", "value", "at most", "")
LOSSES, UPDATE = "loss after the last step", "update"  # findings that are compared between formats
WORDS = {True: "kept", False: "BROKEN", None: ""}


@dataclass(frozen=True)
class Line:
    """A row as it is shown."""

    part: str
    what: str
    value: str
    bound: str = ""
    word: str = ""


def lines(outcomes: Mapping[str, Outcome]) -> Iterator[Line]:
    """In the order of the parts; of each its findings, what is compared with bfloat16, and how it ended if not well."""
    for name in PARTS:
        if name not in outcomes:
            continue
        outcome, shown = outcomes[name], name
        for finding in (*outcome.findings, *compared(outcome, outcomes)):
            what = finding.name + (f" ({finding.note})" if finding.note else "")
            value = f"{number(finding.value)} {finding.unit}".strip()
            bound = "" if finding.bound is None else number(finding.bound)
            yield Line(shown, what, value, bound, WORDS[finding.kept])
            shown = ""
        if outcome.state != "done":
            yield Line(shown, outcome.reason.splitlines()[0] if outcome.reason else "", "", "", outcome.state)


def compared(outcome: Outcome, outcomes: Mapping[str, Outcome]) -> Iterator[Finding]:
    """How a format does beside bfloat16 in the same layers, measured on the same GPU and at the same size."""
    kind, _, format = outcome.part.partition(" ")
    plain = outcomes.get(f"{kind} {'te-bfloat16' if format.startswith('te-') else 'bfloat16'}")
    if plain is None or plain.part == outcome.part or (plain.where, plain.smoke) != (outcome.where, outcome.smoke):
        return
    own, other = _named(outcome), _named(plain)
    if UPDATE in own and UPDATE in other:
        ratio = float(own[UPDATE].value) / float(other[UPDATE].value)
        yield Finding("throughput of updates", ratio, "times bfloat16's")
    if LOSSES in own and LOSSES in other:
        pairs = list(zip(own[LOSSES].series, other[LOSSES].series, strict=True))
        relative = [abs(mine - theirs) / abs(theirs) for mine, theirs in pairs]
        yield Finding("loss beside bfloat16's", max(relative), "largest relative difference")
        yield Finding("loss beside bfloat16's", sum(relative) / len(relative), "mean relative difference")


def _named(outcome: Outcome) -> dict[str, Finding]:
    return {finding.name: finding for finding in outcome.findings}


def number(value: float | str) -> str:
    """To as many digits as anybody reads."""
    if isinstance(value, str):
        return value
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def title(outcomes: Mapping[str, Outcome]) -> str:
    """On what, when, and whether it means anything."""
    where = sorted({outcome.where for outcome in outcomes.values() if outcome.where})
    when = sorted(outcome.when for outcome in outcomes.values() if outcome.when)
    told = f"{', '.join(where) or 'nothing has run'}" + (f"; {when[0]} to {when[-1]} UTC" if when else "")
    smoke = any(outcome.smoke for outcome in outcomes.values())
    return f"{told}; a smoke test at a tiny size: its times mean nothing" if smoke else told


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """How many parts ended how."""
    states = [outcome.state for outcome in outcomes.values()]
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("done", "skipped", "failed", "interrupted"))
    broken = sum(finding.kept is False for outcome in outcomes.values() for finding in outcome.findings)
    return f"{len(PARTS)} parts: {counted}, {len(PARTS) - len(states)} not yet run; {broken} promises broken"


def as_table(outcomes: Mapping[str, Outcome]) -> Table:
    table = Table(title=title(outcomes), caption=summary(outcomes), title_justify="left", caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for line in lines(outcomes):
        table.add_row(*(escape(cell) for cell in (line.part, line.what, line.value, line.bound, line.word)))
    return table


def as_markdown(outcomes: Mapping[str, Outcome]) -> str:
    rows = [(line.part, line.what, line.value, line.bound, line.word) for line in lines(outcomes)]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    head = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"
    return "\n".join([title(outcomes), "", head, *(f"| {row} |" for row in cells), "", summary(outcomes)])

"""Write docs/objectives.md and its pictures from the objectives themselves: `python tools/objective_docs.py`.

Formulas, sources and options come from docstrings and declarations, curves from calling the objectives, the table of real runs
from what tools/study_objectives.py has measured. `--text` leaves the pictures as they are. A test compares the text with what
is committed.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.objectives.base import Divisors, GroupTable, TokenBatch
from megatron_rl.objectives.catalogue import ARXIV, Entry, catalogue, written
from megatron_rl.objectives.compose import Surrogate
from megatron_rl.objectives.registry import SURROGATES

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PICTURES, EXAMPLE = DOCS / "objectives.md", DOCS / "objectives", DOCS / "examples" / "my_objective.py"
STUDY = PICTURES / "study.json"
POINTS = 201
OLD = -1.0  # the old log-prob of the one token that is looked at
NARROW = 1.2e-3  # half of the width shown where the clip band is GSPO's
BLUE, RED = "#0b5fa5", "#c8452d"
HEADINGS = {"advantage": "Advantages", "surrogate": "Surrogates", "weight": "Weights and masks", "penalty": "Penalties"}

# -- curves ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """J and ∂J/∂log π of one token, the only one of its response, against the ratio."""

    value: Tensor  # [points]
    gradient: Tensor  # [points]


def ratios(name: str) -> Tensor:
    """[points] where the surrogate is looked at: close to 1 if that is where its bounds are."""
    if getattr(SURROGATES[name](), "clip_high", 1.0) < 0.01:
        return torch.linspace(1 - NARROW, 1 + NARROW, POINTS, dtype=torch.float64)
    return torch.linspace(0.2, 2.0, POINTS, dtype=torch.float64)


def curve(name: str, advantage: float) -> Curve:
    """By calling the objective at one ratio after the other."""
    points = [_point(name, ratio.log(), advantage) for ratio in ratios(name)]
    value, gradient = (torch.stack(numbers) for numbers in zip(*points, strict=True))
    return Curve(value, gradient)


def _point(name: str, log_ratio: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    surrogate: Surrogate = SURROGATES[name]()
    if surrogate.reads_groups:  # two responses with rewards 1 and 0: the first moves, the other stays
        batch = _prepared(surrogate, _batch([log_ratio.item(), 0.0], [advantage, -advantage]))
    else:
        batch = _batch([log_ratio.item()], [advantage])
    loss = surrogate(batch).loss
    (gradient,) = torch.autograd.grad(loss, batch.log_probs)
    return -loss.detach(), -gradient[0]


def _batch(log_ratios: list[float], advantages: list[float]) -> TokenBatch:
    """Responses of one token each; a mean over responses is taken over the first alone."""
    count = len(log_ratios)
    old = torch.full((count,), OLD, dtype=torch.float64)
    return TokenBatch(
        log_probs=(old + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_(),
        mask=torch.ones(count, dtype=torch.bool),
        segments=torch.arange(count),
        lengths=torch.ones(count, dtype=torch.float64),
        columns={"old": old, "reference": old, "rollout": old, "conflict": torch.ones_like(old)},
        scalars={
            "advantage": torch.tensor(advantages, dtype=torch.float64),
            "reward": (torch.tensor(advantages, dtype=torch.float64) > 0).double(),
            "initial_entropy": torch.ones_like(old),
        },
        divisors=Divisors(1, 1),
        sum_sequences=lambda values: values,
        entropy=torch.zeros_like(old),
    )


def _prepared(surrogate: Surrogate, batch: TokenBatch) -> TokenBatch:
    with torch.no_grad():
        statistics = surrogate.statistics(batch)
    rewards = batch.scalars["reward"]
    table = GroupTable(torch.zeros(batch.count, dtype=torch.int64), rewards, batch.lengths, statistics)
    return replace(batch, scalars={**batch.scalars, **surrogate.prepare(table)})


def compares_with(name: str) -> bool:
    """Is the ratio that moves the one to the reference, and not to `old`?"""
    return bool(SURROGATES[name]().needs_reference)


def curves(name: str) -> list[tuple[float, str, str, str]]:
    """What is drawn: advantage, label, colour, dashes. One curve where there is no advantage to tell two apart."""
    surrogate: Surrogate = SURROGATES[name]()
    if surrogate.reads_groups:
        labels = ("the better of a pair", "the worse of a pair")
    elif surrogate.needs_scalars:
        labels = ("A = +1", "A = −1")
    else:
        return [(1.0, "any response", BLUE, "-")]
    return [(1.0, labels[0], BLUE, "-"), (-1.0, labels[1], RED, "--")]


def draw(name: str, path: Path) -> None:
    """Value and gradient side by side, for both signs of the advantage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "svg.hashsalt": "objectives",
        "svg.fonttype": "none",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    x = ratios(name)
    narrow = x[0] > 0.9
    shown = (x - 1) * 1e4 if narrow else x
    with pyplot.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.0, 3.1), layout="constrained")
        for advantage, label, colour, dashes in curves(name):
            of = curve(name, advantage)
            moved = (of.value - of.value[(x - 1).abs().argmin()]) * (1e4 if narrow else 1)
            left.plot(shown, moved, dashes, color=colour, label=label, linewidth=1.8)
            right.plot(shown, of.gradient, dashes, color=colour, linewidth=1.8)
        left.set_title("value: (J − J(1)) · 10⁴" if narrow else "value: J − J(1)", fontsize=11)
        right.set_title("gradient: ∂J / ∂ log π", fontsize=11)
        for axes in (left, right):
            axes.axvline(0.0 if narrow else 1.0, color="#999999", linewidth=0.7, zorder=0)
            axes.axhline(0.0, color="#999999", linewidth=0.7, zorder=0)
            axes.set_xlabel("(ratio − 1) · 10⁴" if narrow else f"ratio new / {'reference' if compares_with(name) else 'old'}")
            axes.margins(y=0.08)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, title=name, title_fontsize=12)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        pyplot.close(figure)


# -- text ------------------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Objectives

<!-- Written by tools/objective_docs.py from megatron_rl/objectives. Change it there. -->

What a policy is asked to become is put together from four kinds of parts, chosen in the section `objective:` of the settings:
an **advantage** turns the rewards of a group into numbers, one **surrogate** says what is maximised with them, any **weights**
multiply its terms, any **penalties** are added to the loss or taken from the reward.

    loss = −(1/D) Σ_i f_i Σ_t f_it J_it  +  Σ penalties

J are the surrogate's terms, f the product of the weights (a zero drops the term), D a divisor of the whole optimizer step: over
all ranks and micro-batches, and known before the first of them. Loss and gradient do not depend on the layout.

```yaml
objective:
  advantage: grpo
  surrogate: gspo                       # or your own: "my_package.my_module:Class"
  options: {clip_low: 3.0e-4, clip_high: 4.0e-4}
  weights:
    - {name: sequence_weight, options: {cap: 2.0}}
  penalties:
    - {name: kl_loss, options: {coefficient: 1.0e-3}}
  reference: initial
```

A combination that makes no sense is refused with the reason. `megatron-rl objectives` prints this page's formulas, and
`megatron-rl objectives gspo` one of them in full.

In the formulas, `new`, `old`, `reference` and `rollout` are log-probabilities of a token: of the policy that is trained, of the
policy before the update as the trainer computes it, of the frozen reference, of the rollout engine. m is the mask of tokens
that count, L_i how many a response has, N the responses of the step, r a reward, A an advantage; sg[·] stops the gradient.
Ratios, log-probabilities and the loss are float32 whatever the model computes in.
"""

PICTURE_NOTE = """\
The pictures show J of a response with a single token, and its gradient by the token's log-probability, with default options;
the value's constant is taken off. `trpa`, `rebel` and `agro` compare responses: there two of them have the rewards 1 and 0, and
one moves while the other stays. In `cispo` and `gtpo` the ratio is held still, so that the gradient is not the slope of the
value: look at their gradients alone. A response of one token has one ratio, so `dhpo` shows the bounds of both its branches,
the narrow one as a step at 1.
"""

GROUPS = """\
## What looks at a whole group

The samples of a group may lie in different micro-batches and on different data-parallel ranks. Nothing with an entry a token
crosses ranks for their sake:

| part | what it needs of the group | how it gets there |
| --- | --- | --- |
| advantages | rewards (`opo`: lengths too) | computed from whole groups before sharding, one number a response |
| `gtpo`, `gtpo_conflict` | token ids, signs of advantages | before sharding (`gtpo.conflict_columns`), the column `conflict` |
| `gtpo`, `gtpo_entropy` | entropy before training, by the paper's rule | before training, the scalar `initial_entropy` |
| `trpa` | mean log-ratio to the reference of each response | two passes, one number a response exchanged |
| `rebel` | summed log-ratio to `old` | two passes, one number a response exchanged |
| `agro` | summed log-ratio to the reference | two passes, one number a response exchanged |
| `egsw` | mean entropy, advantage | two passes, one number a response exchanged |

**Two passes**: `policy.group_pass.prepare_groups` scores the packs of an optimizer step with the weights of that moment,
gathers the numbers and deals out what each response has to know; then comes `Policy.update` with the packs it returned.

**What the caller must guarantee**, because no rank could see it: an optimizer step (minibatch) holds whole groups, over all its
micro-batches and ranks. A group cut in two is taken for two groups, and what is computed is another loss. `prepare_groups` is
called anew before each update. Responses of one prompt carry the same `Sequence.group`, and no others do. Advantages and the
column `conflict` are made of whole groups as well; once they are made, the other surrogates do not mind how a step is cut.
"""

SEEN = """\
## All of them, seen at work

`python tools/study_objectives.py` trains the toy of the quickstart with each of them: a real policy of one rank, a real SGLang
server, {steps} steps of {groups} groups of {group_size} responses, settings those of
[`configs/quickstart.yaml`](../configs/quickstart.yaml) but for what stands under *with*. Every metric of every step was looked
at: **{verdict}**.

The reward is the mean of the first five and of the last five steps, {samples} responses each: enough to see that something is
learned, and not to tell one row from its neighbour. Learning rate and bounds are GSPO's for this toy and nobody tuned them
for the others. `sft` imitates whatever was said, so it has no reason to rise. `gdpo` adds a second reward and `per_turn`
counts two turns, so both earn up to 2. The share that was clipped is a mean over all updates; in the first of a step nothing
can be, so it is 0 where there is only one.

| part | with | reward | clipped | largest gradient norm | metrics |
| --- | --- | --- | --- | --- | --- |
{rows}
"""

OWN = """\
## Your own objective

A dotted path with a colon names a class of yours: `surrogate: "my_objective:PulledBack"`. Its module must be importable where
the run starts: installed, or in a folder of `PYTHONPATH`. Weights, penalties and advantages of one's own work alike. Fields of
a dataclass are its options: typed, with defaults, and checked like ours. See it with `megatron-rl objectives
my_objective:PulledBack`.

Derive it from `TokenSurrogate` (a value a token) or `SequenceSurrogate` (one a sequence) and say what it maximises; masks,
divisors, weights, penalties and metrics that all have in common are done for you, under every layout. Or write a bare callable,
which gets everything and does everything. This is [{path}]({path}), which the tests run:

```python
{code}```

Three rules keep such a loss right under every layout. Sum over a sequence with `batch.sum_sequences` or `batch.mean_tokens`
alone: other ranks may hold the rest of its tokens. Divide by `batch.divisors`, never by what this batch happens to hold. Mask
with `torch.where`, before anything that could overflow: in a bare objective, entries outside of `batch.mask` may hold anything.
"""


def text() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for kind, heading in HEADINGS.items():
        entries = [entry for entry in catalogue() if entry.kind == kind]
        parts += [f"## {heading}\n", _overview(entries)]
        if kind == "surrogate":
            parts.append(PICTURE_NOTE)
        parts += [_section(entry) for entry in entries]
    parts += [GROUPS, _seen(json.loads(STUDY.read_text(encoding="utf-8")))]
    example = EXAMPLE.relative_to(DOCS).as_posix()
    parts.append(OWN.format(path=example, code=EXAMPLE.read_text(encoding="utf-8")))
    return "\n".join(parts)


def _seen(study: Mapping[str, Any]) -> str:
    """The section of real runs."""
    conditions, runs = study["conditions"], study["runs"]
    wrong = [name for name, run in runs.items() if run["not_finite"] or run["skipped"]]
    verdict = f"nan or infinite in {', '.join(wrong)}" if wrong else "all were finite, and no update was skipped"
    samples = 5 * conditions["groups"] * conditions["group_size"]
    rows = "\n".join(study_row(name, run) for name, run in runs.items())
    return SEEN.format(**conditions, samples=samples, verdict=verdict, rows=rows)


def study_row(name: str, run: Mapping[str, Any]) -> str:
    """A run of tools/study_objectives.py as a row of the table."""
    kind, _, own = name.partition(" ")
    settings = (setting.removeprefix("objective.") for setting in run["settings"])
    partners = " ".join(f"`{setting}`" for setting in settings if setting not in (f"{kind}={own}", "options={}"))
    first, last = (sum(rewards) / len(rewards) for rewards in (run["reward/mean"][:5], run["reward/mean"][-5:]))
    clipped = run.get("clip_fraction")
    share = "" if clipped is None else f"{sum(clipped) / len(clipped):.3f}"
    part, norm = f"{kind} [`{own}`](#{kind}-{own})", f"{max(run['grad_norm']):.3g}"
    return f"| {part} | {partners} | {first:.2f} → {last:.2f} | {share} | {norm} | {run['metrics']} |"


def _overview(entries: Iterable[Entry]) -> str:
    rows = [f"| [`{e.name}`](#{e.kind}-{e.name}) | {_cell(e.title)} | {_source(e)} |" for e in entries]
    return "\n".join(["| name | what it is | source |", "| --- | --- | --- |", *rows]) + "\n"


def _section(entry: Entry) -> str:
    lines = [f"### {entry.kind} {entry.name}", "", entry.text, "", "```text", entry.formula, "```", ""]
    lines += [f"Source: {_source(entry)}", ""]
    if entry.options:
        lines += ["| option | allowed | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{o.name}` | {_cell(o.type_name)} | {written(o.default)} | {_cell(o.text)} |" for o in entry.options]
        lines.append("")
    if entry.kind == "surrogate":
        lines += [f"![Value and gradient of {entry.name} against the ratio](objectives/{entry.name}.svg)", ""]
    return "\n".join(lines)


def _source(entry: Entry) -> str:
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", entry.source)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true", help="the page alone, not the pictures")
    options = parser.parse_args()
    PAGE.write_text(text(), encoding="utf-8")
    if not options.text:
        PICTURES.mkdir(exist_ok=True)
        for name in SURROGATES:
            draw(name, PICTURES / f"{name}.svg")


if __name__ == "__main__":
    main()

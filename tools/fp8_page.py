"""Write the part of docs/fidelity.md that is about FP8, and its pictures, from what tools/study_fp8.py has measured.

Every number of the tables is read from docs/fidelity/fp8.json; a test compares. What is said about them in words was written by
people who looked at the numbers that are committed: after new runs, read it again.
"""

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.marked_pages import with_part
from tools.pictures import draw_two

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FOLDER = DOCS / "fidelity.md", DOCS / "fidelity"
RESULTS = FOLDER / "fp8.json"
FORMATS = {  # as the page calls them
    "bfloat16": "bfloat16 both",
    "FP8 both": "FP8 both",
    "FP8 server": "FP8 server, bfloat16 trainer",
    "FP8 trainer": "bfloat16 server, FP8 trainer",
}
ROUTINGS = ("live", "R2", "R3")
COLOURS = {"bfloat16": "#0b5fa5", "FP8 both": "#3f8f4f", "FP8 server": "#d08a1d", "FP8 trainer": "#c8452d"}
ENDS = 5  # steps at the end of a run that are averaged

type Runs = Mapping[str, Mapping[str, Any]]


@cache
def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def curves(runs: Runs, goal: str, form: str, routing: str, name: str) -> NDArray[np.float64]:
    """[seeds, steps] a metric of an arm."""
    return np.array([run[name] for arm, run in runs.items() if arm.startswith(f"{goal} {form} {routing} seed ")])


def pairs(runs: Runs) -> dict[str, Mapping[str, Any]]:
    """Server and policy, by their formats: how their log-probs compare."""
    return {
        f"{name.removeprefix('server ')} | {policy}": row
        for name, found in runs.items()
        if name.startswith("server ")
        for policy, row in found.items()
    }


# -- tables ----------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 0.01 else f"{value:.2g}"


def share(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def noise_table(runs: Runs) -> list[str]:
    lines = [
        "| server | policy | choices that differ | KL (k3) | mean \\|Δ\\| | largest \\|Δ\\| | \\|sequence ratio − 1\\| "
        "| GSPO would clip | GRPO would clip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = (
        ("kl", number), ("mean", number), ("max", number),
        ("gspo_spread", number), ("gspo_beyond", share), ("grpo_beyond", share),
    )  # fmt: skip
    for pair, row in pairs(runs).items():
        cells = [f"{form(row['live'][name])} → {form(row['R3'][name])}" for name, form in columns]
        lines.append(f"| {pair} | {share(row['choices_differ'])} | {' | '.join(cells)} |")
    return lines


def learning_table(runs: Runs) -> list[str]:
    lines = [
        "| formats | routing | KL of the rollout (k3) | choices held | GSPO clipped | GRPO clipped | GSPO, last reward "
        "| GRPO, last reward |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for form, words in FORMATS.items():
        for routing in ROUTINGS:
            gspo, grpo = (curves(runs, goal, form, routing, "clip_fraction_tokens").mean() for goal in ("gspo", "grpo"))
            kl = float(np.mean([curves(runs, goal, form, routing, "mismatch_k3") for goal in ("gspo", "grpo")]))
            rewards = [spread(curves(runs, goal, form, routing, "reward/mean")[:, -ENDS:].mean(1)) for goal in ("gspo", "grpo")]
            cells = (words, routing, number(kl), held(runs, form, routing), share(gspo), share(grpo), *rewards)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def held(runs: Runs, form: str, routing: str) -> str:
    """The share of choices that routers would have made otherwise, had they been let."""
    if routing == "live":
        return ""
    return share(float(np.mean([curves(runs, goal, form, routing, "replay/choices_differ") for goal in ("gspo", "grpo")])))


def spread(values: NDArray[np.float64]) -> str:
    """A mean over seeds, and the smallest and the largest of them."""
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"


# -- pictures --------------------------------------------------------------------------------------------------------------


def draw(folder: Path) -> None:
    for name, fill in {"noise": _draw_noise, "learning": _draw_learning}.items():
        draw_two(folder / f"{name}.svg", partial(fill, read()["runs"]), (9.6, 3.8))


def _draw_noise(runs: Runs, left: Any, right: Any) -> None:
    """Spread of ratios, and the share that clips would take, of every pair of formats."""
    found = {pair: row for pair, row in pairs(runs).items() if pair != "float32 | float32"}
    places = np.arange(len(found))
    for goal, colour in (("gspo", "#0b5fa5"), ("grpo", "#c8452d")):
        for routing, filled in (("live", colour), ("R3", "none")):
            for axes, member, scale in ((left, f"{goal}_spread", 1), (right, f"{goal}_beyond", 100)):
                values = [scale * row[routing][member] for row in found.values()]
                axes.plot(values, places, "o", color=colour, markerfacecolor=filled, label=f"{goal.upper()}, {routing}")
    left.set(title="mean |ratio − 1| before any update", xscale="log", yticks=places, yticklabels=list(found))
    left.set_ylabel("server | policy")
    right.set(title="beyond the paper's bands, %", yticks=places, yticklabels=[])


def _draw_learning(runs: Runs, left: Any, right: Any) -> None:
    """What servers and trainer disagree by while GSPO learns, and what it earns."""
    for form, words in FORMATS.items():
        for routing, dashes in (("live", "-"), ("R3", "--")):
            label = words if routing == "live" else None
            kl = curves(runs, "gspo", form, routing, "mismatch_k3").mean(0)
            left.plot(kl, dashes, color=COLOURS[form], label=label, linewidth=1.6)
            rewards = curves(runs, "gspo", form, routing, "reward/mean")
            right.plot(rewards.mean(0), dashes, color=COLOURS[form], label=label, linewidth=1.6)
    left.set(title="KL of the rollout (dashed: R3)", xlabel="step", yscale="log", ylim=(5e-6, 0.5))
    right.set(title="mean reward (dashed: R3)", xlabel="step", ylim=(0, 1))


# -- the part of the page --------------------------------------------------------------------------------------------------

PART = """\
{about}

**Noise.** Real SGLang servers sample {prompts} × {tokens} tokens from a random Qwen3-MoE of 8 layers with 16 experts, 4 a
token; policies score them, without → with the server's routing. Ratios are those of a run that takes the rollout's log-probs
for `old`, before anything is learned: all of it is noise. A clip's bands are the paper's, 3e-4/4e-4 for sequences, 0.2/0.27
for tokens. The model's weights are ten times wider than a trained model's beginning, so that logits and routing are sharp and
everything shows: read the rows against one another, not as what your model has.

{noise}

![Spread of ratios and the share that would be clipped, by formats](fidelity/noise.svg)

{about_noise}

**Learning.** The quickstart's toy, {steps} steps of {groups} × {group_size} responses in {minibatches} minibatches, {seeds}
seeds, `old` recomputed by the trainer. KL is of the trainer's `old` against the rollout, mean over all steps and both
objectives; clipped are shares of tokens by a run's own bounds (0.03/0.04 for GSPO); the reward is the mean of the last {ends}
steps (smallest to largest seed).

{learning}

![KL of the rollout and reward while GSPO learns](fidelity/learning.svg)

{about_learning}
"""
# Said by people who looked at the numbers that are committed.
WORDS = {
    "about": """\
`python -m tools.study_fp8`, on two CPU cores. FP8 is **simulated**: a policy in FP8 rounds both inputs of every linear product
(`precision.fp8=simulated`); a server in FP8 has weights that went through FP8, in blocks of 128 × 128, and computes with them
in bfloat16. So "FP8 both" is less alike than two real FP8 engines are: the policy's activations are rounded, the server's are
not.""",
    "about_noise": """\
In bfloat16 repeating the server's routing takes four fifths of the KL or more, whichever side is the coarser, and most of the
outliers; of the tokens that GRPO's band would clip three quarters come back (19% → 4.7%). One format on both sides is better
than a finer one on one of them. With FP8 on either side half of all choices of experts differ, and R3 takes off only a fifth to
two fifths: the rounding itself makes the larger part. GSPO's band is so narrow that nearly every sequence of this exaggerated
model lies beyond it in all formats but float32: `old` is to be recomputed there, as it is by default.""",
    "about_learning": """\
**The mismatch shows.** With FP8 on any side the rollout's KL is six to fifteen times that of bfloat16. R3 leaves a tenth of it
in bfloat16, where it takes the jumps of single steps, and half to three quarters in FP8; R2, which repeats the trainer's own
choices, leaves it as it is. With either, GRPO clips less in all formats but one.

**Learning does not show it.** Rewards of all twelve arms lie within what two seeds of one arm differ by, and so do GSPO's
clipped shares. A model of 2 layers with responses of five tokens does not collapse at a KL of 3e-3 in 20 steps. That says
nothing of 48 layers and thousands of tokens: there, look at the run's `mismatch_k3`.""",
}


def text() -> str:
    """The page as it should be."""
    found = read()
    runs = found["runs"]
    tables = {"noise": "\n".join(noise_table(runs)), "learning": "\n".join(learning_table(runs))}
    return with_part(PAGE, "fp8", PART.format(**found["conditions"], ends=ENDS, **tables, **WORDS))


def write() -> None:
    PAGE.write_text(text(), encoding="utf-8")
    draw(FOLDER)

"""Write docs/study_gspo.md and its pictures from what tools/study_gspo.py has measured. A test compares the text.

Every number of the page is read from docs/study_gspo/results.json. What is said about them in words was written by people who
looked at the numbers that are committed: after new runs, read it again.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.pictures import draw_two

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FOLDER = DOCS / "study_gspo.md", DOCS / "study_gspo"
RESULTS = FOLDER / "results.json"
NAMES = {  # arms as the page calls them
    "gspo": "GSPO, bounds 0.03/0.04",
    "gspo-paper": "GSPO, bounds 3e-4/4e-4",
    "grpo": "GRPO, bounds 0.2/0.27",
    "gspo-replay": "GSPO, bounds 0.03/0.04, replay",
    "grpo-replay": "GRPO, bounds 0.2/0.27, replay",
}
LOOKED_AT = ("gspo", "gspo-paper", "grpo")
RATE = 3e-4  # of configs/quickstart.yaml
COLOURS = {"gspo": "#0b5fa5", "gspo-paper": "#6aa7d8", "grpo": "#c8452d", "gspo-replay": "#0b5fa5", "grpo-replay": "#c8452d"}
ENDS = 5  # steps at the beginning and the end of a run that are averaged

type Runs = Mapping[str, Mapping[str, Any]]
type Table = NDArray[np.float64]


@cache
def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def seeds(runs: Runs, arm: str) -> list[Mapping[str, Any]]:
    """The runs of an arm, by seed."""
    return [run for name, run in runs.items() if name.startswith(f"{arm} seed ")]


def curves(runs: Runs, arm: str, name: str) -> Table:
    """[seeds, steps] a metric."""
    return np.array([run[name] for run in seeds(runs, arm)])


def updates(runs: Runs, arm: str, name: str) -> Table:
    """[runs, steps, minibatches] a number of each update, of the runs that were looked at."""
    return np.array([run["updates"][name] for run in seeds(runs, arm) if "updates" in run])


def rates(runs: Runs, name: str) -> dict[float, Table]:
    """[steps, minibatches] of the same samples at each learning rate; the first steps, as many as all have."""
    other = {float(run.removeprefix("rate ")): np.array(found["updates"][name]) for run, found in runs.items() if "rate" in run}
    steps = min(len(table) for table in other.values())
    found = {**{rate: table[:steps] for rate, table in other.items()}, RATE: updates(runs, "gspo", name)[0, :steps]}
    return dict(sorted(found.items(), reverse=True))


def movement(runs: Runs, arm: str, over: tuple[int, ...]) -> tuple[Table, Table]:
    """How far log-probs of tokens moved that kept their experts, and of those that got others: means over tokens."""
    others = updates(runs, arm, "tokens_changed")
    kept, changed = updates(runs, arm, "moved_same"), updates(runs, arm, "moved_changed")
    weight = np.maximum(others.sum(over), 1e-12)
    return (kept * (1 - others)).sum(over) / (1 - others).sum(over), (changed * others).sum(over) / weight


# -- numbers in words ------------------------------------------------------------------------------------------------------


def share(value: float) -> str:
    """A share, with as many digits as it deserves."""
    if value == 0:
        return "0"
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}".replace("e-0", "e-")


def spread(values: Sequence[float] | Table) -> str:
    """A mean over seeds, and the smallest and the largest of them."""
    return f"{np.mean(values):.2f} ({np.min(values):.2f} to {np.max(values):.2f})"


def clip_rows(runs: Runs) -> str:
    rows = []
    for arm in LOOKED_AT:
        gspo, grpo = updates(runs, arm, "gspo_clipped"), updates(runs, arm, "grpo_clipped")
        times = f"{gspo.mean() / grpo.mean():.0f}" if grpo.mean() else "∞"
        by_order = " / ".join(share(float(value)) for value in gspo.mean((0, 1)))
        rows.append(f"| {NAMES[arm]} | {share(gspo.mean())} | {share(grpo.mean())} | {times} | {by_order} |")
    return "\n".join(rows)


def rate_rows(runs: Runs) -> str:
    gspo, grpo = rates(runs, "gspo_clipped"), rates(runs, "grpo_clipped")
    sequences, tokens = rates(runs, "gspo_ratio_std"), rates(runs, "grpo_ratio_std")
    return "\n".join(
        f"| {rate:.0e} | {share(gspo[rate].mean())} | {share(grpo[rate].mean())} | {sequences[rate][:, 1:].mean():.1e} | "
        f"{tokens[rate][:, 1:].mean():.1e} |"
        for rate in gspo
    )


def routing_rows(runs: Runs) -> str:
    rows = []
    for arm in LOOKED_AT:
        choices, tokens = updates(runs, arm, "choices_changed"), updates(runs, arm, "tokens_changed")
        step = curves(runs, arm, "moe/routing_changed")
        same, other = (float(moves) for moves in movement(runs, arm, (0, 1, 2)))
        moved = f"{same:.3f} | {other:.3f}"
        rows.append(f"| {NAMES[arm]} | {choices.mean():.2%} | {tokens.mean():.2%} | {step.mean():.2%} | {moved} |")
    return "\n".join(rows)


def reward_rows(runs: Runs) -> str:
    rows = []
    for arm, name in NAMES.items():
        rewards = curves(runs, arm, "reward/mean")
        replayed = [run["replay/choices_differ"] for run in seeds(runs, arm) if "replay/choices_differ" in run]
        held = f"{np.mean(replayed):.2%}" if replayed else ""
        own = share(float(curves(runs, arm, "clip_fraction").mean()))
        first, last = rewards[:, :ENDS].mean(1), rewards[:, -ENDS:].mean(1)
        rows.append(f"| {name} | {spread(first)} | {spread(rewards.mean(1))} | {spread(last)} | {own} | {held} |")
    return "\n".join(rows)


# -- pictures --------------------------------------------------------------------------------------------------------------


def draw(folder: Path) -> None:
    """Three pictures."""
    for name, fill in {"clipped": _draw_clipped, "routing": _draw_routing, "reward": _draw_reward}.items():
        draw_two(folder / f"{name}.svg", partial(fill, read()["runs"]), (8.6, 3.4))


def _draw_clipped(runs: Runs, left: Any, right: Any) -> None:
    """By step, and by learning rate."""
    for arm in ("gspo", "grpo"):
        for judge, dashes in (("gspo", "-"), ("grpo", "--")):
            by_step = updates(runs, arm, f"{judge}_clipped").mean((0, 2))
            label = f"{judge.upper()} would clip, in the run of {arm.upper()}"
            left.plot(by_step, dashes, color=COLOURS[arm], label=label, linewidth=1.6)
    left.set(title="tokens clipped at the paper's bounds", xlabel="step", ylabel="share of tokens", ylim=(0, 1))
    for judge in ("gspo", "grpo"):
        found = rates(runs, f"{judge}_clipped")
        means = [max(float(table.mean()), 1e-6) for table in found.values()]
        right.plot(list(found), means, "o-", color=COLOURS[judge], label=judge.upper(), linewidth=1.6)
    right.set(title="the same samples at other rates", xlabel="learning rate", ylabel="share of tokens (0 drawn at 1e-6)")
    right.set_xscale("log")
    right.set_yscale("log")


def _draw_routing(runs: Runs, left: Any, right: Any) -> None:
    """How many choices change, and what that moves."""
    for arm in LOOKED_AT:
        by_step = 100 * updates(runs, arm, "choices_changed").mean((0, 2))
        left.plot(by_step, "-", color=COLOURS[arm], label=f"{NAMES[arm]}: one update", linewidth=1.6)
        whole = 100 * curves(runs, arm, "moe/routing_changed").mean(0)
        left.plot(whole, ":", color=COLOURS[arm], label="a step's four updates", linewidth=1.2)
    left.set(title="choices of experts that changed", xlabel="step", ylabel="%")
    for arm in ("gspo", "grpo"):
        same, other = movement(runs, arm, (0, 2))
        right.plot(other, "-", color=COLOURS[arm], label=f"{arm.upper()}: other experts", linewidth=1.6)
        right.plot(same, "--", color=COLOURS[arm], label=f"{arm.upper()}: same experts", linewidth=1.6)
    right.set(title="movement of log-probs by one update", xlabel="step", ylabel="mean |Δ log p|")


def _draw_reward(runs: Runs, left: Any, right: Any) -> None:
    """Without replay, and with it."""
    for axes, arms in ((left, LOOKED_AT), (right, ("gspo-replay", "grpo-replay"))):
        for arm in arms:
            rewards = curves(runs, arm, "reward/mean")
            axes.plot(rewards.mean(0), color=COLOURS[arm], label=NAMES[arm], linewidth=1.6)
            axes.fill_between(range(rewards.shape[1]), rewards.min(0), rewards.max(0), color=COLOURS[arm], alpha=0.12)
        axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1))
    left.set_title("routers choose anew in each pass")
    right.set_title("routing replay")


# -- text ------------------------------------------------------------------------------------------------------------------

PAGE_TEXT = """\
# GSPO on a toy: what shows, and what does not

<!-- Written by tools/gspo_page.py from docs/study_gspo/results.json. Change it there. -->

The [GSPO paper](https://arxiv.org/abs/2507.18071) says of a mixture of experts of 30 billion parameters with 48 layers:
GSPO clips a hundred times more tokens than GRPO (0.15 of them against 0.0013) and learns better; after an update about
one in ten of the experts that a sample activates is another; so token ratios jump, GRPO needs the routing of the old pass
to be replayed, and GSPO does not. `python tools/study_gspo.py` asks what of it can be seen on the toy of the quickstart:
281,024 parameters, 2 layers, 8 experts of which a token takes 2, responses of about 5 tokens.

Runs are real, with a real SGLang server and [`configs/quickstart.yaml`](../configs/quickstart.yaml) on one rank: {steps}
steps of {groups} groups of {group_size} responses in {minibatches} minibatches, so that three updates of four are
off-policy, learning rate 3e-4, {seeds} seeds of the order of prompts (what servers draw differs in any case). The first
seed of every run without replay was learned from again out of its bank, with the same loss and gradient norm to the last
bit, and looked at around each update: clipping and experts are of these, rewards of all seeds.

## Clipping

The same updates, judged by both: the share of tokens whose gradient GSPO would take at the paper's bounds (3e-4/4e-4, of
the sequence's ratio), and GRPO at its (0.2/0.27, of the token's).

| updates of | GSPO would clip | GRPO would clip | times as many | GSPO, by the minibatch's place in its step |
| --- | --- | --- | --- | --- |
{clip}

![Share of tokens clipped, by step and by learning rate](study_gspo/clipped.svg)

{about_clip}

| learning rate | GSPO would clip | GRPO would clip | spread of sequence ratios | spread of token ratios |
| --- | --- | --- | --- | --- |
{rates}

The samples of the first {rate_steps} steps of `{samples}`, learned from anew at each rate. A spread is the standard
deviation of the ratio off-policy, from the second minibatch on.

{about_rates}

## Experts that change

The same samples, scored before an update and after it: how many choices of experts are others, for how many of the tokens
that count any layer chose another, how many choices changed over a step's {minibatches} updates (of its first minibatch),
and how far the log-probability of a token moved by one update.

| updates of | choices, one update | tokens, one update | choices, a step | moved, same experts | moved, other experts |
| --- | --- | --- | --- | --- | --- |
{routing}

![Choices that changed, and what that moves](study_gspo/routing.svg)

{about_routing}

## Rewards, with and without replay

Mean reward of the first and last five steps and of all {steps}, as mean over seeds (smallest to largest); the share that
a run's own bounds clipped, of tokens for GRPO and of sequences for GSPO; and with replay the share of choices that
routers would have made otherwise in updates, had they been let.

| run | first steps | all steps | last steps | clipped by its own bounds | choices held |
| --- | --- | --- | --- | --- | --- |
{rewards}

![Mean reward by step](study_gspo/reward.svg)

{about_rewards}

## What a toy does not show

{not_shown}

## Again

    python tools/study_gspo.py --help          what the runs are; one by one, or all that are missing
    python tools/study_gspo.py --page          this page from docs/study_gspo/results.json
"""
# Said by people who looked at the numbers that are committed.
WORDS = {
    "about_clip": """\
**This shows, and clearly.** Of the very same updates GSPO would drop twenty to forty times as many tokens as GRPO. Both
shares are larger than the paper's, for the learning rate is hundreds of times larger than those of such models; see
below. Before a step's first update every ratio is exactly 1, so nothing is clipped there: GSPO's share of the other three
is about one half.""",
    "about_rates": """\
Smaller rates soon leave GRPO nothing to clip, while GSPO goes on for two orders of magnitude: its band is some 670 times
narrower, and ratios of sequences spread only two to three times less than those of tokens. Where their spread comes to
the width of the band, at rates of some 1e-6 as such models have, GSPO's share passes through the paper's 0.15, and GRPO's
is 0.""",
    "about_routing": """\
**This shows weakly.** One update changes fewer than one choice in two hundred, not one in ten: the toy has 2 layers and 8
experts, the paper's model 48 and 128. On average a token that got another expert in any layer moved about four times as
far as the others, as the paper fears. But an update has some eighty tokens that count, of which one or two are such; the
picture shows that a few steps carry that average, and that in most of them such tokens moved no further than others. Nor
is it proof of what caused what: where an update changes much, it changes choices too.""",
    "about_rewards": """\
**GSPO against GRPO does not show**, and neither does replay: with and without it both learn, and they differ by less than
the seeds of one arm do. With fewer than one choice in two hundred to hold there is little that replay could do. What does
show is the price of bounds that do not fit: with the paper's, in these runs of large rate and short responses, half of
what comes after a step's first update is thrown away, and in every seed the run earned less than with bounds of
0.03/0.04.""",
    "not_shown": """\
- **That GRPO fails.** It does not here. The paper's runs have responses of thousands of tokens, and many more updates.
- **What length does.** Responses have five tokens. That the noise of token ratios adds up over long ones, as the paper
  argues, cannot be seen.
- **Replay of the servers' routing** (`objective.routing_replay=rollout`). Trainer and server both compute in float32
  here, and what they say of the same tokens differs by a KL of {mismatch}: there is nothing to mend, so no run was spent
  on it.
- **Small differences.** Three seeds of twenty steps tell a large effect from none, and no more.""",
}


def text() -> str:
    """The page."""
    found = read()
    runs, conditions = found["runs"], found["conditions"]
    mismatch = np.mean([run["mismatch_k3"] for run in runs.values() if "mismatch_k3" in run])
    return PAGE_TEXT.format(
        **conditions,
        seeds=len(seeds(runs, "gspo")),
        clip=clip_rows(runs),
        rates=rate_rows(runs),
        routing=routing_rows(runs),
        rewards=reward_rows(runs),
        rate_steps=len(next(iter(rates(runs, "gspo_clipped").values()))),
        samples="gspo seed 0",
        **{name: words.replace("{mismatch}", f"{mismatch:.0e}") for name, words in WORDS.items()},
    )


def write() -> None:
    """The page and its pictures."""
    read.cache_clear()
    PAGE.write_text(text(), encoding="utf-8")
    draw(FOLDER)

"""Train the quickstart's toy with every surrogate, advantage, weight and penalty there is, and see that each does its work.

Real runs: a Megatron-core policy of one rank, a real SGLang server, 30 steps each, no GPU. Each part gets the partners that it
asks for: a reference model, a single update a step, named rewards, turns; everything else is configs/quickstart.yaml with
fewer samples. What counts is that no metric of any step is nan or infinite and no update was skipped; how well a part learns
with settings that nobody has tuned for it is told and not judged.

    python tools/study_objectives.py                      what is missing; may be killed and started again at any time
    python tools/study_objectives.py --list               which runs there are
    python tools/study_objectives.py --only "weight "     some of them, again
    python tools/study_objectives.py --page               docs/objectives.md anew from what there is

Results go to docs/objectives/study.json, a line a run, and from there into docs/objectives.md.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

from megatron_rl.objectives.catalogue import KINDS  # noqa: E402
from tools import objective_docs  # noqa: E402
from tools.toy_runs import (  # noqa: E402
    Laboratory,
    Results,
    Stopped,
    chosen,
    laboratory,
    not_finite,
    progress_bars,
    series,
    show,
    study_parser,
)

STEPS, GROUPS, GROUP_SIZE = 30, 8, 4
CONDITIONS = {"steps": STEPS, "groups": GROUPS, "group_size": GROUP_SIZE}
COMMON = (f"run.steps={STEPS}", f"sampling.groups={GROUPS}", f"sampling.group_size={GROUP_SIZE}")
SERIES = ("reward/mean", "loss", "grad_norm", "clip_fraction", "old_k3")

BAND = "objective.options={clip_low: 0.03, clip_high: 0.04}"  # the quickstart's, for ratios of sequences
ONE_UPDATE = ("batch.minibatches=1", "objective.on_policy=true")
# What a part needs beside what it declares. Other surrogates than these keep their own options.
PARTNERS: Mapping[str, Sequence[str]] = {
    "surrogate gspo": (BAND,),
    "surrogate gspo_token": (BAND,),
    "surrogate luspo": (BAND,),
    "surrogate dhpo": ("objective.options={sequence_clip_low: 0.03, sequence_clip_high: 0.04}",),
    "surrogate gtpo": ("objective.advantage=dr_grpo",),
    "advantage gdpo": ("rewards=[{name: exact}, {name: 'docs.examples.my_rewards:in_place', as: in_place}]",),
    "advantage per_turn": (
        "objective.surrogate=gspo_token",
        "sampling.strategy=episodes",
        "sampling.environment=tools.toy_runs:DigitsAgain",
        "rewards=[]",
    ),
}
OPTIONS: Mapping[str, str] = {"penalty overlong": ", options: {longest: 6, buffer: 2}"}  # responses have five tokens


def names() -> list[str]:
    """Every run: a kind and a name."""
    return [f"{kind} {name}" for kind in ("surrogate", "advantage", "weight", "penalty") for name in KINDS[kind]]


def partners(run: str) -> list[str]:
    """Settings that bring a part together with what it asks for."""
    kind, _, name = run.partition(" ")
    part = KINDS[kind][name]()
    listed = f"[{{name: {name}{OPTIONS.get(run, '')}}}]"
    given: list[str] = []
    if kind == "surrogate":
        given += [f"objective.surrogate={name}", "objective.options={}"]
        given += [] if "advantage" in part.needs_scalars else ["objective.advantage=null"]
    elif kind == "advantage":
        given += [f"objective.advantage={name}"]
    elif kind == "weight" and part.level == "token":
        given += ["objective.surrogate=grpo", "objective.options={}", f"objective.weights={listed}"]
    else:
        given += [f"objective.{'weights' if kind == 'weight' else 'penalties'}={listed}"]
    if getattr(part, "needs_reference", False):
        given += ["objective.reference=initial"]
    if getattr(part, "on_policy_only", False):
        given += ONE_UPDATE
    return [*given, *PARTNERS.get(run, ())]


def learned(run: str, steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "settings": partners(run),
        "metrics": len(steps[0]),
        "not_finite": not_finite(steps),
        "skipped": int(sum(step["skipped_updates"] for step in steps)),
        **series(steps, SERIES),
    }


def study(laboratory: Laboratory, todo: Sequence[str], results: Results) -> list[str]:
    """Do runs, one after the other; the names of those that failed."""
    failed = []
    with progress_bars() as progress:
        whole = progress.add_task("runs", total=len(todo))
        for run in todo:
            task = progress.add_task(run, total=STEPS)
            try:
                steps = laboratory.run("objective", [*COMMON, *partners(run)], partial(progress.advance, task))
            except Stopped:
                raise
            except Exception as error:
                progress.console.print(f"{run}: {type(error).__name__}: {error}")
                failed.append(run)
            else:
                results.add(run, learned(run, steps), names())
                rewards = results.runs[run]["reward/mean"]
                progress.console.print(f"{run}: reward {mean(rewards[:5]):.2f} → {mean(rewards[-5:]):.2f}")
            progress.remove_task(task)
            progress.advance(whole)
    return failed


def main() -> None:
    arguments = study_parser(__doc__, objective_docs.STUDY).parse_args()
    results = Results(arguments.results, CONDITIONS)
    if arguments.list:
        show(names(), results.runs)
        return
    todo = [] if arguments.page else chosen(names(), results.runs, arguments.only)
    failed = []
    if todo:
        try:
            with laboratory(arguments.folder) as opened:
                failed = study(opened, todo, results)
        except Stopped as error:
            sys.exit(f"{error}; start again to go on")
    if arguments.results == objective_docs.STUDY:
        objective_docs.PAGE.write_text(objective_docs.text(), encoding="utf-8")
    missing = [name for name in names() if name not in results.runs]
    wrong = [name for name, run in results.runs.items() if run["not_finite"] or run["skipped"]]
    print(f"{len(results.runs)} runs, missing: {', '.join(missing) or 'none'}; not finite: {', '.join(wrong) or 'none'}")
    sys.exit(bool(failed or wrong))


if __name__ == "__main__":
    main()

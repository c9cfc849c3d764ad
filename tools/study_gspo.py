"""See on the quickstart's toy what the GSPO paper (2507.18071) says of mixtures of experts, and what a toy cannot show.

Real runs: a Megatron-core policy of one rank, a real SGLang server, four minibatches a step as in the paper, several seeds, no
GPU.

    gspo            sequence ratios, with the quickstart's bounds 0.03/0.04, which fit this toy
    gspo-paper      with the paper's own bounds 3e-4/4e-4
    grpo            token ratios, with the paper's bounds 0.2/0.27
    …-replay        the same, the experts of the pass that scored `old` replayed in updates (objective.routing_replay=policy)
    rate …          the samples of `gspo seed 0` learned from again at other learning rates

The first seed of each run without replay is learned from a second time, out of its bank: the same updates, bit for bit, and
around each of them a look at its samples. Which would GSPO clip at the paper's bounds, which GRPO? Which experts are chosen?

    python tools/study_gspo.py                            what is missing; may be killed and started again at any time
    python tools/study_gspo.py --list                     which runs there are
    python tools/study_gspo.py --only "grpo seed 1"       one of them, again
    python tools/study_gspo.py --page                     docs/study_gspo.md and its pictures from what there is

Results go to docs/study_gspo/results.json, a line a run, and from there into docs/study_gspo.md.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_rl.config.settings import Settings  # noqa: E402
from megatron_rl.objectives.base import Objective, TokenBatch  # noqa: E402
from megatron_rl.objectives.registry import build_objective  # noqa: E402
from megatron_rl.policy.layout import Launch  # noqa: E402
from megatron_rl.policy.policy import Policy, UpdateReport  # noqa: E402
from megatron_rl.policy.reduction import reduce_results  # noqa: E402
from megatron_rl.policy.routing_watch import RoutingWatch  # noqa: E402
from megatron_rl.rollout.bank.reader import BankReader  # noqa: E402
from megatron_rl.train import objective  # noqa: E402
from megatron_rl.train.learner import Learner  # noqa: E402
from megatron_rl.types import Pack  # noqa: E402
from tools import gspo_page  # noqa: E402
from tools.toy_runs import (  # noqa: E402
    Laboratory,
    Results,
    Stopped,
    chosen,
    laboratory,
    progress_bars,
    rounded,
    series,
    show,
    study_parser,
)

STEPS, MINIBATCHES, GROUPS, GROUP_SIZE = 20, 4, 8, 8
SEEDS = 3  # of each arm
CONDITIONS = {"steps": STEPS, "minibatches": MINIBATCHES, "groups": GROUPS, "group_size": GROUP_SIZE}
COMMON = (
    f"run.steps={STEPS}",
    f"batch.minibatches={MINIBATCHES}",
    f"sampling.groups={GROUPS}",
    f"sampling.group_size={GROUP_SIZE}",
    "observe.look_every=1",
    "observe.traces=0",
)
REPLAY = "objective.routing_replay=policy"
GRPO = ("objective.surrogate=grpo", "objective.options={clip_low: 0.2, clip_high: 0.27}")
ARMS: Mapping[str, Sequence[str]] = {
    "gspo": (),
    "gspo-paper": ("objective.options={clip_low: 3.0e-4, clip_high: 4.0e-4}",),
    "grpo": GRPO,
    "gspo-replay": (REPLAY,),
    "grpo-replay": (*GRPO, REPLAY),
}
SAMPLES = "gspo seed 0"  # the run whose samples are learned from at other rates
RATES = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
RATE_STEPS = 10
SERIES = (
    "reward/mean", "clip_fraction", "old_k3", "ratio_deviation", "grad_norm", "mismatch_k3", "moe/routing_changed",
    "replay/differs", "replay/choices_differ",
)  # fmt: skip
# The paper's experiment: which samples of an update would either have clipped?
PAPER: Mapping[str, Objective] = {
    "gspo": build_objective("gspo", {"clip_low": 3e-4, "clip_high": 4e-4}),
    "grpo": build_objective("grpo", {"clip_low": 0.2, "clip_high": 0.27}),
}

type Numbers = dict[str, float]


def plan() -> list[str]:
    """Every run, seed after seed."""
    first, *others = ([f"{arm} seed {seed}" for arm in ARMS] for seed in range(SEEDS))
    return [*first, *(f"rate {rate:g}" for rate in RATES), *(name for names in others for name in names)]


def looks(name: str) -> bool:
    """Are this run's updates looked at? One seed is enough: there are many updates, and they are all alike."""
    return name.endswith("seed 0") and "replay" not in name


# -- looking at updates ----------------------------------------------------------------------------------------------------


class WatchedPolicy(Policy):
    """A policy that looks at the samples of each update just before it and just after."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[Numbers] = []

    def update(
        self, packs: Sequence[Pack], objective: Objective, columns: Mapping[str, Sequence[Tensor]] | None = None
    ) -> UpdateReport:
        with self.watching() as choices_before:
            before = self.observe(packs, objective, columns)
        clipped = {name: reduce_results([judge(b) for b in before], self.layout)[1] for name, judge in PAPER.items()}
        report = super().update(packs, objective, columns)
        with self.watching() as choices_after:
            after = self.observe(packs, objective, columns)
        self.seen.append(
            {
                **{f"{name}_clipped": metrics["clip_fraction_tokens"] for name, metrics in clipped.items()},
                **{f"{name}_ratio_std": metrics["ratio_std"] for name, metrics in clipped.items()},
                "choices_changed": choices_before.changed(choices_after, self.layout),
                **moved(packs, before, after, rerouted(choices_before, choices_after)),
            }
        )
        return report


def rerouted(before: RoutingWatch, after: RoutingWatch) -> list[Tensor]:
    """For each pack, [real tokens] bool: has any layer chosen another expert?"""
    layers = [
        [(old & ~new).any(1) for old, new in zip(choices, after.choices[layer], strict=True)]
        for layer, choices in before.choices.items()
    ]
    return [torch.stack(pack).any(0) for pack in zip(*layers, strict=True)]


def moved(
    packs: Sequence[Pack], before: Sequence[TokenBatch], after: Sequence[TokenBatch], changed: Sequence[Tensor]
) -> Numbers:
    """How many tokens got other experts, and how far log-probs moved where that is so and elsewhere.

    A token's log-prob is computed at the position before it, whose experts are meant.
    """
    sums = np.zeros((2, 2))  # [same experts, other experts] x [tokens, their movement]
    for pack, old, new, other in zip(packs, before, after, changed, strict=True):
        real = np.zeros(pack.tokens, np.bool_)
        for start, sequence in zip(np.cumsum((0, *pack.padded_lengths)), pack.sequences, strict=False):
            real[start : start + sequence.length] = True
        counts = old.mask.numpy()[real]  # [real tokens]
        movement = (new.log_probs - old.log_probs).abs().numpy()[real]
        for row, chosen_here in enumerate((~other.numpy() & counts, other.numpy() & counts)):
            sums[row] += chosen_here.sum(), movement[chosen_here].sum(dtype=np.float64)
    means = sums[:, 1] / np.maximum(sums[:, 0], 1)
    return {"tokens_changed": sums[1, 0] / sums[:, 0].sum(), "moved_same": means[0], "moved_changed": means[1]}


def looked_at(
    settings: Settings, steps: int, told: Sequence[Mapping[str, float]] | None, advance: Callable[[], None]
) -> dict[str, list[list[float]]]:
    """Learn from a run's bank as the run itself did; for each number a row a step, an entry an update.

    `told` is what the run said of its steps: the same must come out again.
    """
    goal, advantage = objective.build(settings.objective)
    policy = WatchedPolicy.open(settings, Launch())
    learner = Learner(policy, goal, advantage, settings)
    with BankReader(settings.bank_directory) as bank:
        for step in range(steps):
            with bank.step(step) as rows:
                report = learner.learn(step, rows)
            if told is not None and any(report.metrics[name] != told[step][name] for name in ("loss", "grad_norm")):
                raise RuntimeError(f"step {step} of {settings.run.directory} was learned otherwise than in the run itself")
            advance()
    policy.close()
    by_step = [policy.seen[start : start + MINIBATCHES] for start in range(0, len(policy.seen), MINIBATCHES)]
    return {name: [rounded([update[name] for update in updates], 4) for updates in by_step] for name in policy.seen[0]}


# -- the study -------------------------------------------------------------------------------------------------------------


def of_arm(laboratory: Laboratory, name: str, advance: Callable[[], None]) -> dict[str, Any]:
    """A run with a seed, and a look at its updates."""
    arm, _, seed = name.partition(" seed ")
    own = [*ARMS[arm], f"run.seed={seed}"]
    steps = laboratory.run(name, [*COMMON, *own], advance)
    found = {"settings": own, **series(steps, SERIES)}
    if not looks(name):
        return found
    return {**found, "updates": looked_at(laboratory.settings(name, [*COMMON, *own]), STEPS, steps, advance)}


def of_rate(laboratory: Laboratory, name: str, advance: Callable[[], None]) -> dict[str, Any]:
    """The samples of another run, learned from at another rate."""
    own = [f"optimizer.lr={name.removeprefix('rate ')}"]
    settings = laboratory.settings(SAMPLES, [*COMMON, *own])
    if not settings.bank_directory.exists():
        raise RuntimeError(f"the samples of {SAMPLES} are not in {settings.bank_directory}: do --only '{SAMPLES}' first")
    return {"settings": own, "updates": looked_at(settings, RATE_STEPS, None, advance)}


def study(laboratory: Laboratory, todo: Sequence[str], results: Results) -> None:
    with progress_bars() as progress:
        whole = progress.add_task("runs", total=len(todo))
        for name in todo:
            rate = name.startswith("rate")
            task = progress.add_task(name, total=RATE_STEPS if rate else 2 * STEPS if looks(name) else STEPS)
            do = of_rate if rate else of_arm
            found = do(laboratory, name, partial(progress.advance, task))
            results.add(name, found, plan())
            progress.remove_task(task)
            progress.advance(whole)


def main() -> None:
    arguments = study_parser(__doc__, gspo_page.RESULTS).parse_args()
    results = Results(arguments.results, CONDITIONS)
    if arguments.list:
        show(plan(), results.runs)
        return
    todo = [] if arguments.page else chosen(plan(), results.runs, arguments.only)
    if todo:
        try:
            with laboratory(arguments.folder) as opened:
                study(opened, todo, results)
        except Stopped as error:
            sys.exit(f"{error}; start again to go on")
    missing = [name for name in plan() if name not in results.runs]
    if missing:
        sys.exit(f"no page yet, for these runs are missing: {', '.join(missing)}")
    if arguments.results == gspo_page.RESULTS:
        gspo_page.write()


if __name__ == "__main__":
    main()

"""What objectives cost: seconds per million tokens, against one log-softmax; and GSPO's share of an update.

Forward and backward. The yardstick is a log-softmax over the vocabulary for as many tokens, the least that whatever trains a
language model does with its logits. An update is a real one, of the model and packs of tools/bench_policy.py: its time
with GSPO, less that with a loss that does next to nothing, would drown in noise; so the calls of the objective inside of it are
timed, and a backward pass through the objective alone is added.

    python tools/bench_objectives.py                       all of it
    python tools/bench_objectives.py --vocab 151936 --yardstick-tokens 512
    python tools/bench_objectives.py --no-update           the objectives alone
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_rl.objectives.base import Divisors, GroupTable, Objective, ObjectiveResult, TokenBatch  # noqa: E402
from megatron_rl.objectives.registry import SURROGATES, build_objective  # noqa: E402
from megatron_rl.policy.layout import Launch  # noqa: E402
from megatron_rl.policy.policy import Policy  # noqa: E402
from tools import bench_policy  # noqa: E402

MILLION = 1_000_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens of the batch (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a response (default %(default)s)")
    parser.add_argument("--vocab", type=int, default=32_768, help="of the log-softmax (default %(default)s)")
    parser.add_argument("--yardstick-tokens", type=int, default=2048, help="tokens of the log-softmax (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is shown (default %(default)s)")
    parser.add_argument("--no-update", action="store_true", help="leave GSPO's share of an update out")
    return parser.parse_args()


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """After one round that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# -- objectives alone ------------------------------------------------------------------------------------------------------


def make_batch(tokens: int, length: int) -> TokenBatch:
    """Responses in groups of eight, all tokens count."""
    generator = torch.Generator().manual_seed(0)
    count = tokens // length
    tokens = count * length

    def near(values: Tensor, spread: float) -> Tensor:
        return values + spread * torch.randn(tokens, generator=generator)

    old = -2 * torch.rand(tokens, generator=generator)  # [tokens]
    sizes = torch.full((count,), length)
    rewards = torch.randint(0, 2, (count,), generator=generator).float()
    return TokenBatch(
        log_probs=near(old, 0.05).requires_grad_(),
        mask=torch.ones(tokens, dtype=torch.bool),
        segments=torch.arange(count).repeat_interleave(length),
        lengths=sizes.float(),
        columns={
            "old": old,
            "rollout": near(old, 0.01),
            "reference": near(old, 0.1),
            "conflict": torch.ones(tokens),
        },
        scalars={"advantage": 2 * rewards - 1, "reward": rewards, "initial_entropy": torch.ones(count)},
        divisors=Divisors(count, tokens),
        sum_sequences=lambda values: torch.segment_reduce(values, "sum", lengths=sizes, unsafe=True),
        entropy=torch.rand(tokens, generator=generator),
    )


def prepared(name: str, batch: TokenBatch) -> TokenBatch:
    """With the scalars that a loss over groups reads; that pass is not timed."""
    surrogate = SURROGATES[name]()
    if not surrogate.reads_groups:
        return batch
    with torch.no_grad():
        statistics_of = surrogate.statistics(batch)
    groups = torch.arange(batch.count) // 8
    table = GroupTable(groups, batch.scalars["reward"], batch.lengths, statistics_of)
    given = {key: values.float() for key, values in surrogate.prepare(table).items()}
    return replace(batch, scalars={**batch.scalars, **given})


def objective_seconds(objective: Objective, batch: TokenBatch, rounds: int) -> float:
    """Forward, metrics and backward, per million tokens."""

    def work() -> None:
        torch.autograd.grad(objective(batch).loss, batch.log_probs)

    return median_seconds(work, rounds) / batch.mask.numel() * MILLION


def log_softmax_seconds(tokens: int, vocab: int, rounds: int) -> float:
    """Forward and backward, per million tokens."""
    logits = torch.randn(tokens, vocab).requires_grad_()
    labels = torch.randint(vocab, (tokens, 1))

    def work() -> None:
        log_probs = torch.log_softmax(logits, -1).gather(1, labels)  # [tokens, 1]
        torch.autograd.grad(log_probs.sum(), logits)

    return median_seconds(work, rounds) / tokens * MILLION


# -- in an update ----------------------------------------------------------------------------------------------------------


class Timed:
    """An objective that notes how long it takes, its share of the backward pass included, without changing the result."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.needs_entropy, self.seconds = objective, objective.needs_entropy, 0.0

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        start = time.perf_counter()
        result = self.objective(batch)
        self.seconds += time.perf_counter() - start
        leaf = batch.log_probs.detach().requires_grad_()
        alone = self.objective(replace(batch, log_probs=leaf))
        start = time.perf_counter()
        torch.autograd.grad(alone.loss, leaf)
        self.seconds += time.perf_counter() - start
        return result


def share_of_update(rounds: int) -> tuple[float, float]:
    """Median seconds of an update with GSPO, and of GSPO in it."""
    options = bench_policy.arguments([])
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy.open(bench_policy.settings(options, Path(folder)), Launch())
    packs = policy.pack(bench_policy.sequences(options))
    old = {"old": [values.log_probs for values in policy.log_probs(packs)]}
    gspo = build_objective("gspo")
    whole = median_seconds(lambda: policy.update(packs, gspo, old), rounds)
    inside: list[float] = []
    for _ in range(rounds):
        timed = Timed(gspo)
        policy.update(packs, timed, old)
        inside.append(timed.seconds)
    policy.close()
    return whole, statistics.median(inside)


def report(rows: Sequence[tuple[str, float]], yardstick: float) -> None:
    for name, seconds in rows:
        print(f"  {name:12s} {seconds:8.3f} s   {seconds / yardstick:8.3%} of log-softmax")


def main() -> None:
    options = arguments()
    batch = make_batch(options.tokens, options.length)
    yardstick = log_softmax_seconds(options.yardstick_tokens, options.vocab, options.rounds)
    print(f"per million tokens, forward and backward, {torch.get_num_threads()} threads, medians of {options.rounds}")
    print(f"  log-softmax over {options.vocab} tokens of vocabulary: {yardstick:.3f} s")
    rows = [(name, objective_seconds(build_objective(name), prepared(name, batch), options.rounds)) for name in SURROGATES]
    report(rows, yardstick)
    if not options.no_update:
        whole, inside = share_of_update(options.rounds)
        print(
            f"an update with GSPO, as in tools/bench_policy.py: {whole:.3f} s, of it GSPO {inside:.4f} s, {inside / whole:.3%}"
        )


if __name__ == "__main__":
    main()

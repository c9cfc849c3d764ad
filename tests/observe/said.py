"""What a made-up model says: a real bank of it, and the traces of what learning did with it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.observe.journal import Journal
from megatron_rl.observe.records import SequenceTrace
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.types import Group, Prompt, Sample, Segment
from tests.data.byte_tokenizer import write_tokenizer
from tests.observe.runs import MadeRun

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)></script><!--"
ASKED = ("What is 17 + 25? Put the answer in \\boxed{}.", "Sort 9 4 7 1 into rising order, and say why.")
SAID = (
    "17 + 25: 17 + 20 = 37, and 37 + 5 = 42. The answer is \\boxed{42}.<|im_end|>",
    "Let me count in tens: 10 + 20 = 30, 7 + 5 = 12, 30 + 12 = 42.\nSo the answer is \\boxed{42}.<|im_end|>",
    f"I would rather write {EVIL} than do sums: \\boxed{{43}}.<|im_end|>",
    "שלום — 合計は 42 です 🧮 \u202ebackwards\u202c. " * 3,
    "The sum of 17 and 25 is surely 32, since 1 + 2 = 3 and 7 + 5 = 2, and nothing is carried over.<|im_end|>",
    "wait, " * 60,
)
GROUP_SIZE = len(SAID)
ROWS = GROUP_SIZE * len(ASKED)


def write_run(directory: Path, tokenizer: Path, steps: int = 40, sealed: int = 3, made: MadeRun | None = None) -> None:
    """A whole run's directory: its journal, and a bank of its newest steps."""
    made = made or MadeRun(traced=write_bank(directory / "bank", tokenizer, range(steps - sealed, steps)))
    made.tell(Journal(directory), 0, steps)


def write_bank(path: Path, tokenizer: Path, steps: Sequence[int], note: bool = True) -> list[list[SequenceTrace]]:
    """Seal steps, and give what learning might have done with each of their samples."""
    words = Tokenizer(str(write_tokenizer(tokenizer)))
    bank = Bank(path, tokenizer=str(tokenizer) if note else None)
    traced = []
    for step in steps:
        groups = [_group(words, step, number) for number in range(len(ASKED))]
        for group in groups:
            bank.append(group)
        bank.seal(step, [group.key for group in groups], decode=words.decode)
        rng = np.random.default_rng([3, step])
        pairs = [(group, index) for group in groups for index in range(GROUP_SIZE)]
        traced.append([_trace(group, row, index, rng) for row, (group, index) in enumerate(pairs)])
    bank.close()
    return traced


def _group(words: Tokenizer, step: int, number: int) -> Group:
    prompt = np.array(words.encode([ASKED[number]], special=False)[0])
    rng = np.random.default_rng([5, step, number])
    samples = tuple(_sample(words, prompt, text, index, step, rng) for index, text in enumerate(SAID))
    return Group(f"task:arithmetic/{number}#{step}", Prompt(f"task:arithmetic/{number}", prompt), samples, step)


def _sample(words: Tokenizer, prompt: np.ndarray, text: str, index: int, step: int, rng: np.random.Generator) -> Sample:
    """The fifth has words of an environment in it, the second lived through an update, the last has no honest reward."""
    said = np.array(words.encode([text], special=False)[0])
    start, stop, third = len(prompt), len(prompt) + len(said), len(said) // 3
    segments = [Segment(0, start, "prompt"), Segment(start, stop, "policy", step)]
    if index == 1:
        segments[1:] = [Segment(start, start + third, "policy", step), Segment(start + third, stop, "policy", step + 1)]
    if index == 4:
        segments[1:] = [
            Segment(start, start + third, "policy", step),
            Segment(start + third, start + 2 * third, "environment"),
            Segment(start + 2 * third, stop, "policy", step, turn=1),
        ]
    log_probs = np.where(np.arange(stop) < start, 0, -rng.exponential(0.4, stop)).astype(np.float32)
    exact = float(index < 2)
    return Sample(
        tokens=np.concatenate([prompt, said]).astype(np.int64),
        log_probs=log_probs,
        segments=tuple(segments),
        finish="length" if index in (3, 5) else "stop",
        rewards={"exact": exact, "format": 0.5 if index < 3 else 0.0},
        reward=exact + (0.25 if index < 3 else 0.0),
        failure="the judge did not answer within 30 s" if index == 5 else None,
    )


def _trace(group: Group, row: int, index: int, rng: np.random.Generator) -> SequenceTrace:
    sample = group.samples[index]
    mask = sample.loss_mask
    log_ratio = np.where(mask, rng.normal(0, 0.004, sample.length), 0).astype(np.float32)
    rewards = np.array([each.reward for each in group.samples])
    advantage = float((sample.reward - rewards.mean()) / rewards.std())
    own = np.where(mask, advantage * np.linspace(0.5, 1.5, sample.length), 0).astype(np.float32) if index == 1 else None
    return SequenceTrace(row, group.key, advantage, float(np.exp(log_ratio[mask].mean())), index in (2, 4), log_ratio, own)

"""Sealed steps of made-up samples, for tests of learning."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.sealed import SealedStep
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.types import Group, Prompt, Sample, Segment

VOCABULARY = 120


def made_up_routing(generator: np.random.Generator, length: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """[length - 1, layers, top-k] experts as dice choose them, each once."""
    return generator.random((length - 1, layers, experts)).argsort(-1)[..., :top_k].astype(np.uint8)


def made_up_sample(generator: np.random.Generator, prompt: np.ndarray, turns: int) -> Sample:
    """A prompt, then turns of the policy with something of an environment between them."""
    parts, segments, start = [prompt], [Segment(0, len(prompt), "prompt")], len(prompt)
    for turn in range(turns):
        own = generator.integers(VOCABULARY, size=int(generator.integers(1, 9)))
        segments.append(Segment(start, start + len(own), "policy", int(generator.integers(3)), turn))
        parts.append(own)
        start += len(own)
        if turn + 1 < turns:
            seen = generator.integers(VOCABULARY, size=3)
            segments.append(Segment(start, start + 3, "environment", turn=turn))
            parts.append(seen)
            start += 3
    tokens = np.concatenate(parts).astype(np.int64)
    reward = float(generator.integers(4)) / 2
    log_probs = np.zeros(len(tokens), np.float32)
    for segment in segments:
        if segment.author == "policy":
            log_probs[segment.start : segment.stop] = -generator.random(segment.stop - segment.start) * 5
    rewards = {"exact": reward, "shape": float(generator.random())}
    turn_rewards = tuple(generator.random(turns).tolist()) if turns > 1 else ()
    return Sample(tokens, log_probs, tuple(segments), "stop", rewards, reward, turn_rewards=turn_rewards)


def sealed_steps(
    folder: Path,
    steps: int,
    *,
    groups: int = 5,
    size: int = 4,
    turns: int = 1,
    seed: int = 0,
    routing: tuple[int, int, int] | None = None,
) -> None:
    """A bank of sealed steps. With `routing` (layers, experts, top-k) each second sample has made-up routing."""
    generator = np.random.default_rng(seed)
    dice = np.random.default_rng([seed, 1])

    def routed(number: int, sample: Sample) -> Sample:
        if routing is None or number % 2:
            return sample
        return replace(sample, routing=made_up_routing(dice, sample.length, *routing))

    with Bank(folder) as bank:
        for step in range(steps):
            for number in range(step * groups, (step + 1) * groups):
                tokens = generator.integers(VOCABULARY, size=int(generator.integers(2, 7))).astype(np.int64)
                prompt = Prompt(f"p{number}", tokens)
                samples = tuple(routed(i, made_up_sample(generator, prompt.tokens, turns)) for i in range(size))
                bank.append(Group(f"p{number}@{number}", prompt, samples, step))
            bank.seal(step)


def sealed_step(
    folder: Path,
    *,
    groups: int = 5,
    size: int = 4,
    turns: int = 1,
    seed: int = 0,
    routing: tuple[int, int, int] | None = None,
) -> SealedStep:
    """A step of groups in a bank of its own."""
    sealed_steps(folder, 1, groups=groups, size=size, turns=turns, seed=seed, routing=routing)
    return BankReader(folder).step(0)

"""Groups for the bank's tests: any that hypothesis thinks of, and such as follow from their key alone."""

import zlib
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.types import Group, Prompt, Sample, Segment

FINISHES = ("stop", "length", "abort", "budget", "error")


def exact(value: Any) -> Any:
    """A value by its bits, so that NaN equals itself, 0.0 differs from -0.0, and an array is its bytes with dtype and shape."""
    match value:
        case np.ndarray():
            return value.dtype.str, value.shape, value.tobytes()
        case float():
            return value.hex()
        case Group() | Prompt() | Sample() | Segment():
            return type(value).__name__, {name: exact(inner) for name, inner in vars(value).items()}
        case dict():
            return {name: exact(inner) for name, inner in value.items()}
        case list() | tuple():
            return type(value).__name__, [exact(inner) for inner in value]
        case _:
            return type(value).__name__, value


def made(key: str, step: int = 0, samples: int = 2, length: int = 40) -> Group:
    """A group that is the same whoever makes it."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))

    def sample(number: int) -> Sample:
        own = length + int(rng.integers(0, 9))
        return Sample(
            tokens=rng.integers(0, 150_000, own),
            log_probs=rng.normal(size=own).astype(np.float32),
            segments=(Segment(0, 7, "prompt"), Segment(7, 20, "policy", step, 0), Segment(20, own, "policy", step + 1, 0)),
            finish="stop",
            rewards={"exact": float(rng.normal()), "format": 0.5},
            reward=float(rng.normal()),
            failure=None if number else "the reward failed",
            routing=rng.integers(0, 128, (own - 1, 2, 2)).astype(np.uint8),
            turn_rewards=(1.0, 0.25),
        )

    prompt = Prompt(
        f"prompt of {key}", rng.integers(0, 150_000, 7), ({"role": "user", "content": f"ask {key}"},), {"answer": key}, 99
    )
    return Group(key, prompt, tuple(sample(number) for number in range(samples)), step, {"tries": 1.0})


def contents(path: Path) -> dict[str, Group]:
    """All finished groups of a bank, read as somebody else would; none twice."""
    with BankReader(path) as reader:
        found = list(reader.waiting())
        for step in reader.steps():
            with reader.step(step) as sealed:
                found += list(sealed.groups())
    keys = [group.key for group in found]
    assert len(keys) == len(set(keys)), sorted(keys)
    return {group.key: group for group in found}


# -- any group at all --------------------------------------------------------------------------------------------------

text = st.text(max_size=8)
float32 = arrays.arrays(np.float32, st.integers(0, 0), elements=st.floats(width=32))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


def tokens(length: int) -> st.SearchStrategy[Any]:
    return arrays.arrays(np.int64, length, elements=st.integers(0, 2**31 - 1))


@st.composite
def segments(draw: st.DrawFn, length: int) -> tuple[Segment, ...]:
    inner = draw(st.lists(st.integers(1, length - 1), unique=True, max_size=4)) if length > 1 else []
    ends = [0, *sorted(inner), length]
    return tuple(
        Segment(
            start,
            stop,
            draw(st.sampled_from(("prompt", "policy", "environment"))),
            draw(st.none() | st.integers(0, 2**40)),
            draw(st.integers(0, 50)),
            draw(st.booleans()),
        )
        for start, stop in pairwise(ends)
    )


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    length = draw(st.integers(1, 6))
    kind = draw(st.sampled_from((None, np.uint8, np.uint16)))
    shape = (length - 1, draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    return Sample(
        tokens=draw(tokens(length)),
        log_probs=draw(arrays.arrays(np.uint32, length)).view(np.float32),  # any bits
        segments=draw(segments(length)),
        finish=draw(st.sampled_from(FINISHES)),
        rewards=draw(st.dictionaries(text, st.floats(), max_size=3)),
        reward=draw(st.floats()),
        failure=draw(st.none() | text),
        routing=None if kind is None else draw(arrays.arrays(kind, shape)),
        turn_rewards=tuple(draw(st.lists(st.floats(), max_size=3))),
    )


@st.composite
def groups(draw: st.DrawFn, key: str) -> Group:
    prompt = Prompt(
        draw(text),
        draw(st.integers(0, 5).flatmap(tokens)),
        tuple(draw(st.lists(st.fixed_dictionaries({"role": text, "content": text}), max_size=2))),
        draw(st.dictionaries(text, json_values, max_size=3)),
        draw(st.none() | st.integers(0, 2**40)),
    )
    members = tuple(draw(st.lists(samples(), min_size=1, max_size=3)))
    return Group(key, prompt, members, draw(st.integers(0, 3)), draw(st.dictionaries(text, st.floats(), max_size=2)))


def random_moments(count: int, longest: float) -> list[float]:
    """Seconds after which to strike; different in every run, as crashes are."""
    chance = Random()
    return [chance.uniform(0.0, longest) for _ in range(count)]

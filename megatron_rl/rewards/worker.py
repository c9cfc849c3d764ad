"""A worker process: makes the rewards that it is told to, then scores samples until its input ends.

It reads pickles of its own starter, and answers lines of JSON; what a reward prints goes to standard error.
"""

import json
import os
import pickle
import resource
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_rl.rewards.sandbox import kernel


@dataclass(frozen=True)
class Hello:
    """What a worker is told first."""

    rewards: Mapping[int, tuple[str, Mapping[str, Any]]]  # name and options by number
    memory: int | None  # bytes of address space


def main(parent: int) -> None:
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    hello = read(requests)
    try:
        from megatron_rl.rewards.registry import make

        rewards: dict[int, Any] = {number: make(name, options) for number, (name, options) in hello.rewards.items()}
        for reward in rewards.values():
            reward.prepare()
        _tell(replies, {"ready": True})
    except Exception as error:
        _tell(replies, {"error": f"{type(error).__name__}: {error}"})
        return
    if hello.memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (hello.memory, hello.memory))
    while (request := read(requests)) is not None:
        number, prompt, text, sample = request
        try:
            _tell(replies, {"value": rewards[number].score(prompt, text, sample)})
        except Exception as error:
            _tell(replies, {"error": say(error)})


def say(error: BaseException) -> str:
    """An error in one line; a reward's own words without the name of their class."""
    from megatron_rl.rewards.base import RewardError

    words = " ".join(str(error).split())[:500]
    return words if isinstance(error, RewardError) else f"{type(error).__name__}: {words}" if words else type(error).__name__


def read(stream: BinaryIO) -> Any:
    """The next pickle, behind its length; None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return pickle.loads(stream.read(int.from_bytes(head, "little")))


def written(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=5)
    return len(body).to_bytes(8, "little") + body


def _tell(stream: Any, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()

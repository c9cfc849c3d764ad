"""Functions of a user's own, good and bad."""

import asyncio
import os
import sys
import time
from typing import Any

from megatron_rl.types import Prompt, Sample


def length(prompt: Prompt, text: str, sample: Sample, scale: float = 1.0) -> float:
    return len(text) / scale


def misbehave(prompt: Prompt, text: str, sample: Sample) -> Any:
    """As the response says."""
    match text:
        case "raise":
            raise KeyError("wrong\nkey")
        case "loop":
            while True:
                pass
        case "sleep":
            time.sleep(1000)
        case "exit":
            sys.exit(3)
        case "die":
            os._exit(4)
        case "nan":
            return float("nan")
        case "text":
            return "1"
        case "none":
            return None
        case "print":
            print("to be or not to be")
            os.write(1, b'{"value": 7}\n')
        case "memory":
            return len(bytearray(64 << 30))
        case "input":
            return len(sys.stdin.read())
    return 1.0


async def misbehave_waiting(prompt: Prompt, text: str, sample: Sample) -> Any:
    match text:
        case "raise":
            raise KeyError("wrong\nkey")
        case "sleep":
            await asyncio.sleep(1000)
        case "exit":
            sys.exit(3)
        case "cancel":
            raise asyncio.CancelledError
        case "nan":
            return float("nan")
        case "timeout":
            raise TimeoutError("of its own")
    return 1


async def busy(prompt: Prompt, text: str, sample: Sample) -> float:
    """How many of us there are at once."""
    marks = prompt.fields["marks"]
    marks.append(1)
    here = len(marks)
    await asyncio.sleep(0.01)
    marks.pop()
    return float(here)


not_a_function = 3

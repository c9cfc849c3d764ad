"""Rewards of one's own. In the settings:

    rewards:
      - {name: 'my_rewards:brevity', as: short, weight: 0.2, options: {arguments: {scale: 100}}}
      - {name: 'my_rewards:ask_a_service', options: {timeout: 5}}
      - {name: 'my_rewards:in_place'}

Tested in tests/rewards/test_model.py.
"""

import asyncio

from megatron_rl.types import Prompt, Sample


def brevity(prompt: Prompt, text: str, sample: Sample, scale: float = 50.0) -> float:
    """A plain function computes: it runs in a worker process, and is killed with it when its time is up."""
    return 1 / (1 + len(text) / scale)


async def ask_a_service(prompt: Prompt, text: str, sample: Sample) -> float:
    """An async function waits for others, a database say: it runs among the sampler's own waiting."""
    await asyncio.sleep(0)
    if "answer" not in prompt.fields:
        raise ValueError("nothing is known about this prompt")  # this sample's failure, not the run's
    return float(prompt.fields["answer"] in text)


def in_place(prompt: Prompt, text: str, sample: Sample) -> float:
    """How much of the answer is right: characters that stand where they should, as a share of the longer of the two."""
    right = str(prompt.fields["answer"])
    return sum(mine == theirs for mine, theirs in zip(text, right, strict=False)) / max(len(text), len(right), 1)

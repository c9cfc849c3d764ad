"""iGRPO (arXiv 2602.09000): drafts first, then responses that improve on the best of them.

Stage 1 draws N drafts from x and keeps the best-rewarded one, d. Stage 2 samples G responses from [x; d] and learns from
those only: the draft is part of their prompt. N + G is what one plain group would cost (8 becomes 4 + 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_rl.rollout.strategies.base import Floor, Graded, Round, is_whole
from megatron_rl.rollout.strategies.grouped import respond_in_parallel
from megatron_rl.types import Prompt, Sample


class DraftPrompt(Protocol):
    """Makes the second prompt: the question with the draft in it."""

    def __call__(self, prompt: Prompt, draft: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Improved:
    """A group of `size` responses that each improve on the best of `drafts`."""

    size: int
    drafts: int
    with_draft: DraftPrompt

    async def run(self, prompt: Prompt, key: str, floor: Floor, unfinished: Sequence[Sample] = ()) -> Round:
        """Drafts that were cut off are drawn again; responses that were cut off go on from their own prompt."""
        information: dict[str, float] = {}
        if unfinished:
            first = unfinished[0]
            second = first.tokens[: first.prompt_length]
        else:
            drafts = await respond_in_parallel(prompt.tokens, self.drafts, key, floor, prompt.max_new_tokens)
            if not all(map(is_whole, drafts)):
                return Round(unfinished=())
            graded = await floor.judge.score(prompt, drafts)
            best = max(graded, key=lambda sample: sample.reward)  # of equals, the first
            second = self.with_draft(prompt, best.tokens[best.prompt_length :])
            information = {"draft_reward": best.reward, "mean_draft_reward": sum(s.reward for s in graded) / len(graded)}
        samples = await respond_in_parallel(second, self.size, key, floor, prompt.max_new_tokens, unfinished)
        if not all(map(is_whole, samples)):
            return Round(unfinished=tuple(samples))
        graded = await floor.judge.score(replace(prompt, tokens=second), samples)
        return Round((Graded(tuple(graded), information=information),))

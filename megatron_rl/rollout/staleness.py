"""How far sampling may run ahead of learning: the arithmetic, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Staleness:
    """Each step learns from `per_step` groups, and from none that was begun more than `bound` updates before.

    Groups are learned from in the order they were begun, so the group that is begun after `begun` others belongs to step
    begun // per_step, counted from 0, and step n is learned after n updates. Hence one may begin while
    begun < (version + bound + 1) * per_step. With bound 0 sampling and learning take turns.
    """

    per_step: int
    bound: int

    def __post_init__(self) -> None:
        if self.per_step < 1 or self.bound < 0:
            raise ValueError(f"per_step = {self.per_step} must be at least 1, and bound = {self.bound} at least 0")

    def may_begin(self, begun: int, version: int) -> int:
        """How many more groups may begin, when `begun` have: the learned, the finished and the unfinished."""
        return max((version + self.bound + 1) * self.per_step - begun, 0)

    def step_of(self, begun: int) -> int:
        """The step that learns from the group which begins when `begun` others have."""
        return begun // self.per_step

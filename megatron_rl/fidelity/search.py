"""How far the search for a cause is: what is equal by now, what that left, and the policy, which is asked again and again."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.report import Cause, CauseName, Stage, Tolerance
from megatron_rl.fidelity.scoring import Answer, Ask, score
from megatron_rl.fidelity.server import Facts, Observation
from megatron_rl.fidelity.tokens import Compared
from megatron_rl.policy.layout import Launch

HELPS = 0.5  # a thing made equal is a cause if at most so much of the difference is left


@dataclass
class Search:
    """How far the search is: what is equal by now, and what that left."""

    settings: Settings
    launch: Launch
    longest: int
    tolerated: float | None
    architecture: Architecture
    temperature: float  # of the policy's log-probs
    drawn_at: float  # the server's temperature
    folder: Path  # for files that live as long as the search
    observed: Observation | None = None  # on the main rank, until all know it
    stages: list[Stage] = field(default_factory=list)
    aside: list[Stage] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)  # by what they are about
    known: dict[Ask, Answer] = field(default_factory=dict)  # of the present settings and tokens

    @property
    def observation(self) -> Observation:
        assert self.observed is not None, "nothing was drawn yet"
        return self.observed

    @property
    def facts(self) -> Facts:
        return self.observation.facts

    @property
    def layers(self) -> list[int]:
        return [layer for layer, holds in enumerate(self.architecture.moe_layers) if holds]

    @property
    def current(self) -> Stage:
        return self.stages[-1]

    @property
    def done(self) -> bool:
        return self.current.within

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance.of(format_of(self.settings), self.facts.format, self.tolerated)

    @property
    def replayable(self) -> bool:
        return self.architecture.is_moe and all(each.routing is not None for each in self.observation.drawn)

    def ask(self, *asks: Ask) -> list[Answer]:
        """What the policy says; it is opened for all that was not asked before."""
        new = [each for each in dict.fromkeys(asks) if each not in self.known]
        if new:
            self.observed, answers = score(self.settings, self.launch, self.observed, self.longest, new)
            self.known |= dict(zip(new, answers, strict=True))
        return [self.known[each] for each in asks]

    def observe(self, observed: Observation | None) -> None:
        """Go on with other tokens, which the main rank has."""
        self.observed, self.known = observed, {}

    def change(self, settings: Settings) -> tuple[Settings, dict[Ask, Answer]]:
        """Go on with another policy; what is returned puts the former back."""
        former = self.settings, self.known
        self.settings, self.known = settings, {}
        return former

    def put_back(self, former: tuple[Settings, dict[Ask, Answer]]) -> None:
        self.settings, self.known = former

    def stage(self, name: str, text: str, answer: Answer, *, given: bool = False) -> Stage:
        compared = Compared.of(self.observation.drawn, answer.log_probs, answer.routes, layers=self.layers, given=given)
        return Stage(name, text, compared, self.tolerance)

    def take(self, stage: Stage, cause: CauseName, text: str, *, anyway: bool = False) -> bool:
        """Go on from this stage if it helped, and name the cause."""
        before, after = self.current.compared, stage.compared
        if not (anyway or stage.within or after.mean <= HELPS * before.mean):
            return False
        self.stages.append(stage)
        self.causes.append(Cause(cause, text, before.mean, after.mean))
        return True


def format_of(settings: Settings) -> str:
    """The coarsest number format of the policy's products."""
    return "fp8" if settings.precision.fp8 != "off" else settings.precision.dtype

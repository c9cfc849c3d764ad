"""Every idea by its name, and how a run's words become an objective.

A name with a colon, `my_package.my_module:Class`, is the user's own: a class built like those here (a dataclass whose fields
are its options, see compose.py), or, for a surrogate, any callable objective (base.Objective).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from megatron_rl.objectives import advantages, clip, corrections, egsw, gtpo, penalties, smooth
from megatron_rl.objectives.advantages import Advantage
from megatron_rl.objectives.agro import AnyGenerationLoss
from megatron_rl.objectives.base import Objective
from megatron_rl.objectives.checking import fits, say_type, suggestion
from megatron_rl.objectives.compose import ComposedObjective, LossPenalty, Part, RewardPenalty, Surrogate, Weight
from megatron_rl.objectives.groups import GroupSurrogate
from megatron_rl.objectives.gspo import SequencePolicyLoss, TokenAdvantagePolicyLoss
from megatron_rl.objectives.luspo import LengthUnbiasedPolicyLoss
from megatron_rl.objectives.rebel import RelativeRewardRegression
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.objectives.trpa import PreferencePairLoss

Words = Mapping[str, Any]  # options by name
NO_WORDS: Words = {}


def _by_name(*classes: type[Part] | type[Advantage]) -> dict[str, type]:
    return {cls.name: cls for cls in classes}


ADVANTAGES: dict[str, type] = _by_name(
    advantages.GroupStandardised,
    advantages.GroupCentred,
    advantages.LeaveOneOut,
    advantages.LengthWeighted,
    advantages.DecoupledRewards,
    advantages.BatchWhitened,
    advantages.GroupCentredBatchWhitened,
    advantages.TurnStandardised,
)
SURROGATES: dict[str, type] = _by_name(
    SequencePolicyLoss,
    TokenAdvantagePolicyLoss,
    LengthUnbiasedPolicyLoss,
    clip.TokenPolicyLoss,
    clip.DecoupledClipPolicyLoss,
    clip.AdaptiveBoundaryLoss,
    clip.HybridPolicyLoss,
    smooth.WeightClipPolicyLoss,
    smooth.SoftAdaptiveLoss,
    smooth.GeometricMeanLoss,
    smooth.SoftSequenceLoss,
    smooth.ClippingFreeLoss,
    gtpo.TrajectoryPolicyLoss,
    PreferencePairLoss,
    RelativeRewardRegression,
    AnyGenerationLoss,
    SupervisedLoss,
)
WEIGHTS: dict[str, type] = _by_name(
    corrections.TruncatedImportanceWeight,
    corrections.IcePopWeight,
    corrections.SequenceWeight,
    corrections.GeometricMask,
    corrections.OffPolicySequenceMask,
    egsw.EntropyGuidedWeight,
    gtpo.ConflictWeight,
    gtpo.EntropyFilter,
)
PENALTIES: dict[str, type] = _by_name(
    penalties.ReferenceKlLoss,
    penalties.ReferenceKlReward,
    penalties.EntropyBonus,
    penalties.OverlongPenalty,
)


# -- building --------------------------------------------------------------------------------------------------------------


def build_objective(
    surrogate: str,
    options: Words = NO_WORDS,
    *,
    weights: Sequence[tuple[str, Words]] = (),
    penalties: Sequence[tuple[str, Words]] = (),
    on_policy: bool = False,
) -> Objective:
    """An objective from names and options. What is unknown or makes no sense together is refused with the reason."""
    core = _build("surrogate", SURROGATES, surrogate, options)
    if not isinstance(core, Surrogate):
        if weights or penalties:
            raise ValueError(
                f"{surrogate} is a whole objective of its own, so there is nothing to weigh or to add penalties to. "
                "Derive it from megatron_rl.objectives.compose.Surrogate, or leave weights and penalties out."
            )
        if not callable(core) or not hasattr(core, "needs_entropy"):
            raise ValueError(f"{surrogate} is no objective: it must be callable with a TokenBatch and have `needs_entropy`")
        return cast(Objective, core)
    factors: list[Weight] = [_build("weight", WEIGHTS, name, words, Weight) for name, words in weights]
    _refuse_weights(core, factors)
    extra = [_build("penalty", PENALTIES, name, words, LossPenalty | RewardPenalty) for name, words in penalties]
    _refuse_twice([part.name for part in (*factors, *extra)])
    return ComposedObjective(
        core,
        tuple(factors),
        tuple(part for part in extra if isinstance(part, LossPenalty)),
        tuple(part for part in extra if isinstance(part, RewardPenalty)),
        on_policy,
    )


def build_advantage(name: str, options: Words = NO_WORDS) -> Advantage:
    """An advantage from its name and options."""
    return cast(Advantage, _build("advantage", ADVANTAGES, name, options, Advantage))


def refuse_pair(advantage: Advantage | None, objective: Objective, *, reference: bool, on_policy: bool) -> None:
    """Raise ValueError, with the reason, for an advantage and an objective that make no sense in a run.

    reference: is there a reference model? on_policy: is there exactly one optimizer step a rollout? Only objectives that say
    what they need are judged; a user's own callable is left to its own.
    """
    if isinstance(objective, Surrogate):
        objective = ComposedObjective(objective)
    if not isinstance(objective, ComposedObjective):
        return
    _refuse_without_reference(objective, reference)
    _refuse_advantage(advantage, objective, on_policy)
    if on_policy:
        _refuse_idle_weights(objective)
    else:
        _refuse_off_policy(objective.surrogate)
    if advantage is not None and advantage.per_turn:
        _refuse_turns(advantage, objective)


def _refuse_without_reference(objective: ComposedObjective, reference: bool) -> None:
    if objective.needs_reference and not reference:
        asking = ", ".join(part.name for part in objective.parts if part.needs_reference)
        raise ValueError(
            f"{asking} compares with a reference model and the run has none. Name one, or choose another objective."
        )


def _refuse_advantage(advantage: Advantage | None, objective: ComposedObjective, on_policy: bool) -> None:
    name = objective.surrogate.name
    reads = "advantage" in objective.needs_scalars
    if advantage is None and reads:
        raise ValueError(f"{name} needs an advantage and the run names none. Choose one of {', '.join(ADVANTAGES)}.")
    if advantage is not None and not reads:
        raise ValueError(f"{name} takes no advantage, so '{advantage.name}' would do nothing. Set the advantage to null.")
    if not reads and "reward" not in objective.needs_scalars and objective.reward_penalties:
        idle = ", ".join(part.name for part in objective.reward_penalties)
        raise ValueError(f"{idle} changes rewards, and {name} reads none, so it would do nothing. Leave it out.")
    if advantage is not None and advantage.on_policy_only and not on_policy:
        raise ValueError(
            f"advantage '{advantage.name}' is the best baseline for samples of the policy itself, and the run takes several "
            "optimizer steps a rollout. Take one step a rollout (on_policy), or another advantage, dr_grpo say."
        )


def _refuse_off_policy(surrogate: Surrogate) -> None:
    if surrogate.on_policy_only:
        others = f", or {' and '.join(surrogate.includes)} as weights of gspo_token" if surrogate.includes else ""
        raise ValueError(
            f"{surrogate.name} has a ratio that is always 1: nothing in it answers for how far the policy has gone since it "
            "sampled, and the run takes several optimizer steps a rollout. Take one step a rollout (on_policy), or another "
            f"surrogate{others}."
        )


def _refuse_idle_weights(objective: ComposedObjective) -> None:
    for weight in objective.weights:
        if weight.off_policy_only:
            raise ValueError(
                f"weight {weight.name} is about how far the policy has gone since `old`; with one optimizer step a rollout "
                "(on_policy) that is nowhere, so it would do nothing. Leave it out."
            )


def _refuse_turns(advantage: Advantage, objective: ComposedObjective) -> None:
    if not objective.surrogate.reads_token_advantages:
        raise ValueError(
            f"advantage '{advantage.name}' differs from turn to turn, and {objective.surrogate.name} has one for a whole "
            "sequence. Take gspo_token, or a surrogate with a ratio for each token."
        )
    for weight in objective.weights:
        if "advantage" in weight.needs_scalars:
            raise ValueError(
                f"weight {weight.name} reads a sequence's advantage, and '{advantage.name}' has one a turn. Leave the weight "
                "out, or take another advantage."
            )


def _refuse_weights(core: Surrogate, factors: Sequence[Weight]) -> None:
    for weight in factors:
        if isinstance(core, GroupSurrogate):
            raise ValueError(
                f"{core.name} is a loss of pairs or groups, so a factor for one of its responses has no meaning; "
                f"leave weight {weight.name} out"
            )
        if weight.level == "token" and core.level == "sequence":
            raise ValueError(
                f"weight {weight.name} has a factor for each token, and {core.name} has one value a sequence, which has no "
                "token terms to multiply. Take a weight by sequence (sequence_weight, geometric_mask), or gspo_token."
            )
        if weight.name in core.includes:
            raise ValueError(
                f"{core.name} does itself what weight {weight.name} does, so it would be done twice. Leave the weight out: "
                f"the options of {core.name} say how."
            )


def _refuse_twice(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is named more than once; the effects would multiply. Name it once.")


def _build(kind: str, table: Mapping[str, type], name: str, options: Words, wanted: Any = object) -> Any:
    cls = find(kind, table, name)
    _check_options(name, cls, options)
    try:
        part = cls(**options)
    except TypeError as error:
        raise ValueError(f"{kind} {name} cannot be made with the options {dict(options)}: {error}") from error
    if not isinstance(part, wanted):
        raise ValueError(f"{name} is named as a {kind} and is none: derive it from the class of that kind (compose.py)")
    return part


def find(kind: str, table: Mapping[str, type], name: str) -> type:
    """The class by a name of ours, or by the dotted path of the user's own."""
    if ":" not in name:
        if name not in table:
            hint = suggestion(name, table) or f"there are {', '.join(table)}; your own is 'package.module:Class'."
            raise ValueError(f"no {kind} is called '{name}'; {hint}")
        return table[name]
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} '{name}' cannot be loaded: {error}. Is its package importable from here?") from error
    if not isinstance(cls, type):
        raise ValueError(f"{kind} '{name}' is a {type(cls).__name__}; name a class")
    return cls


# -- describing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """A field of an idea's dataclass."""

    name: str
    type: Any
    default: Any
    text: str

    @property
    def type_name(self) -> str:
        return say_type(self.type)


def describe(cls: type) -> Iterator[Option]:
    """The options of an idea, its own before those that all of its kind have."""
    if not is_dataclass(cls):
        return
    hints = get_type_hints(cls, include_extras=True)
    for field in sorted(fields(cls), key=lambda f: f.name in ("aggregation", "constant")):
        hint, text = hints[field.name], ""
        if get_origin(hint) is Annotated:
            hint, text = get_args(hint)[:2]
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield Option(field.name, hint, default, text)


def _check_options(name: str, cls: type, options: Words) -> None:
    for _, problem in wrong_options(name, cls, options):
        raise ValueError(problem)


def wrong_options(name: str, cls: type, options: Words) -> Iterator[tuple[str, str]]:
    """The options that a dataclass does not have, and the values that do not fit: each with what is wrong."""
    if not is_dataclass(cls):
        return
    known = {option.name: option for option in describe(cls)}
    for word, value in options.items():
        if word not in known:
            hint = suggestion(word, known) or f"it has {', '.join(known) or 'none'}."
            yield word, f"{name} has no option '{word}'; {hint}"
        elif not fits(value, known[word].type):
            yield word, f"{name}: {word}={value!r} is not {known[word].type_name}"

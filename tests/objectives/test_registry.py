"""From names to objectives: what is built, and what is refused with a reason that helps."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rl.objectives.registry import (
    ADVANTAGES,
    PENALTIES,
    SURROGATES,
    WEIGHTS,
    build_advantage,
    build_objective,
    describe,
)
from tests.objectives.samples import sample_of
from tests.objectives.steps import run

KINDS = {"advantage": ADVANTAGES, "surrogate": SURROGATES, "weight": WEIGHTS, "penalty": PENALTIES}
IDEAS = [(kind, name) for kind, table in KINDS.items() for name in table]
OWN = "tests.objectives.own"


@pytest.mark.parametrize(("kind", "name"), IDEAS)
def test_every_idea_says_what_it_is(kind: str, name: str) -> None:
    """Under its own name, with a docstring, and a text, a type and a default for every option."""
    cls: Any = KINDS[kind][name]
    assert (cls.name, cls.kind) == (name, kind)
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    defaults = cls()
    for option in describe(cls):
        assert option.text and option.type_name
        assert getattr(defaults, option.name) == option.default
    with pytest.raises(AttributeError):
        defaults.name_that_no_idea_has = 1


DEFAULTS = {
    ("gspo", "clip_low"): 3e-4,
    ("gspo", "clip_high"): 4e-4,
    ("gspo_token", "clip_low"): 3e-4,
    ("luspo", "clip_high"): 4e-4,
    ("grpo", "clip_low"): 0.2,
    ("grpo", "clip_high"): 0.2,
    ("dapo", "clip_high"): 0.28,
    ("dapo", "aggregation"): "token_mean",
    ("cispo", "aggregation"): "token_mean",
    ("sapo", "tau_positive"): 1.0,
    ("sapo", "tau_negative"): 1.05,
    ("gmpo", "clip_high"): 0.4,
    ("dhpo", "alpha"): 0.5,
    ("dhpo", "token_clip_high"): 0.28,
    ("gtpo", "gamma"): 0.1,
    ("trpa", "beta"): 0.1,
    ("trpa", "top"): 2.5,
    ("trpa", "kl"): 1e-3,
    ("rebel", "eta"): 1.0,
    **{("abc", f"epsilon_{k}"): 0.2 for k in (1, 2, 3, 4)},
}


@pytest.mark.parametrize(("name", "option"), DEFAULTS)
def test_defaults_are_the_papers(name: str, option: str) -> None:
    assert getattr(SURROGATES[name](), option) == DEFAULTS[name, option]


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: build_objective("gsppo"), "did you mean 'gspo'"),
    (lambda: build_objective("gpso"), "did you mean 'gspo', .*'gtpo'"),
    (lambda: build_objective("GSPO"), "did you mean 'gspo'"),
    (lambda: build_objective("quux_and_more"), "there are gspo, "),
    (lambda: build_advantage("rlo"), "did you mean 'rloo'"),
    (lambda: build_objective("gspo", weights=[("icepopp", {})]), "did you mean 'icepop'"),
    (lambda: build_objective("gspo", penalties=[("kl_los", {})]), "did you mean 'kl_loss'"),
    (lambda: build_objective("gspo", {"clip_hihg": 1e-3}), "did you mean 'clip_high'"),
    (lambda: build_objective("gspo", {"clip_high": "wide"}), "clip_high='wide' is not a finite number"),
    (lambda: build_objective("gspo", {"clip_high": True}), "clip_high=True"),
    (lambda: build_objective("gspo", {"clip_high": float("nan")}), "clip_high=nan"),
    (lambda: build_objective("grpo", {"aggregation": "mean"}), "sequence_mean, token_mean, constant"),
    (lambda: build_objective("grpo", {"constant": 0.0}), "constant"),
    (lambda: build_objective("grpo", {"dual_clip": 0.5}), "dual_clip"),
    (lambda: build_objective("gspo", weights=[("tis", {})]), "no token terms"),
    (lambda: build_objective("gspo", weights=[("icepop", {})]), "gspo_token"),
    (lambda: build_objective("rebel", weights=[("opsm", {})]), "pairs or groups"),
    (lambda: build_objective("gspo", weights=[("opsm", {}), ("opsm", {})]), "more than once"),
    (lambda: build_objective("grpo", weights=[("icepop", {"low": 2.0, "high": 1.0})]), "low=2.0 is above high=1.0"),
    (lambda: build_objective("gtpo", weights=[("gtpo_conflict", {})]), "gtpo does itself what weight gtpo_conflict does"),
    (lambda: build_objective("gtpo", weights=[("gtpo_entropy", {})]), "gtpo does itself what weight gtpo_entropy does"),
    (lambda: build_objective("gspo", penalties=[("overlong", {"longest": 10, "buffer": 20})]), "buffer=20"),
    (lambda: build_objective(f"{OWN}:Missing"), "Missing"),
    (lambda: build_objective("no_such_package.at_all:Loss"), "no_such_package"),
    (lambda: build_objective(f"{OWN}:NUMBER"), "name a class"),
    (lambda: build_objective(f"{OWN}:Nothing"), "needs_entropy"),
    (lambda: build_objective(f"{OWN}:Reinforce", {"scal": 2.0}), "did you mean 'scale'"),
    (lambda: build_objective(f"{OWN}:Bare", weights=[("opsm", {})]), "whole objective"),
]


@pytest.mark.parametrize(("build", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refused(build: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()


# Options that would turn a bound, a weight or a penalty upside down, or divide nothing by nothing.
UPSIDE_DOWN = {
    **{
        (name, side): -0.1
        for name in ("gspo", "gspo_token", "luspo", "grpo", "dapo", "gmpo")
        for side in ("clip_low", "clip_high")
    },
    **{("abc", f"epsilon_{k}"): -0.1 for k in (1, 2, 3, 4)},
    **{("dhpo", f"{branch}_clip_{side}"): -0.1 for branch in ("token", "sequence") for side in ("low", "high")},
    ("cispo", "clip_high"): -0.1,
    ("cfpo", "epsilon"): 0.0,
    ("sapo", "tau_positive"): 0.0,
    ("sspo", "tau_negative"): 0.0,
    ("gtpo", "gamma"): -0.1,
    ("trpa", "beta"): 0.0,
    ("trpa", "kl"): -0.1,
    ("rebel", "eta"): 0.0,
    ("agro", "beta"): 0.0,
    ("opsm", "delta"): -0.1,
    ("egsw", "temperature"): 0.0,
    ("tis", "cap"): 0.0,
    ("kl_loss", "coefficient"): -0.1,
    ("kl_reward", "coefficient"): -0.1,
    ("overlong", "factor"): -0.1,
}


def test_options_that_turn_things_upside_down() -> None:
    """Whatever has the option: the surrogate, weight, penalty or advantage of that name."""
    for (name, option), value in UPSIDE_DOWN.items():
        cls = next(table[name] for table in (SURROGATES, WEIGHTS, PENALTIES) if name in table)
        with pytest.raises(ValueError, match=f"{name}: {option}={value} must"):
            cls(**{option: value})
    for name in ("grpo", "gdpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "per_turn"):
        with pytest.raises(ValueError, match=f"{name}: epsilon=0.0 must be above 0"):
            build_advantage(name, {"epsilon": 0.0})


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="egsw"):
        run(build_objective("gspo", weights=[("egsw", {})]), [sample_of([0.1])])


def test_a_users_own() -> None:
    """By dotted path, with options, weights and penalties if it is built like ours; bare if it is not."""
    samples = [sample_of([0.5, 1.5], 2.0), sample_of([-1.0], 1.0)]
    own = build_objective(f"{OWN}:Reinforce", {"scale": 3.0}, weights=[("opsm", {})])
    assert run(own, samples).answer.loss == pytest.approx(-(3 * 2 * 1.0 + 3 * -1.0) / 2)
    assert run(build_objective(f"{OWN}:Bare"), samples).answer.loss == pytest.approx(-1 / 3)

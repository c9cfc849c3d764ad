"""The search for the cause: one thing after another is made equal on both sides, and what takes the difference away is named.

    temperature → config.json → number format → routing replayed → weights sent again → what remains: kernels

The order is from what explains the others to what it explains: another number format changes routing, other weights change
everything. Weights come late because finding them changes the server; where replaying the server's routing leaves nothing,
they are not asked for. When they were wrong, what they hid is looked for again.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import require_valid
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.report import FINENESS, Cause, Report, Stage, number
from megatron_rl.fidelity.scoring import Answer, Ask
from megatron_rl.fidelity.search import HELPS, Search, format_of
from megatron_rl.fidelity.server import Facts, Observation, served_architecture, write_config
from megatron_rl.fidelity.tokens import growth
from megatron_rl.policy.layout import Launch, together
from megatron_rl.weights.fp8_audit import LayerAudit, audit_layers, served_layers
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.compare import Part
from megatron_rl.weights.publish.wire import fp8_quantizer

LIKE_ROUNDING = 2.0  # times what rounding does to the policy's own log-probs
GROWS = 0.3  # rank correlation of |Δ| with the position
MANY = 0.25  # share of the parts that differ where weights are of another version, and not single tensors wrong
SHOWN = 4  # tensors that a verdict names
TEMPERATURES = tuple(float(value) for value in np.geomspace(0.25, 4.0, 13))
OF_NO_MATTER = ("family", "init_std", "max_positions")  # of a model, to its log-probs

type Tell = Callable[[str], None]


@dataclass(frozen=True)
class Hands:
    """What can be done to the server, by the main rank alone."""

    observe: Callable[[], Observation]  # draw responses, and say who the server is
    resend: Callable[[Observation], Observation]  # send the checkpoint's weights part by part, and draw anew


@dataclass(frozen=True)
class Wanted:
    """What is asked of the search; the same on every rank."""

    longest: int  # tokens of a prompt with its response
    drawn_at: float  # the temperature that the server samples at
    may_send: bool  # weights to the server, to find those that differ
    tolerance: float | None = None  # mean |Δ|; None: by number format
    step: int | None = None  # that the checkpoint is of, where it says so


def examine(settings: Settings, launch: Launch, hands: Hands | None, wanted: Wanted, tell: Tell) -> Report:
    """Find out. Every rank calls it, the main one with the server in its hands."""
    architecture = read_architecture(settings.policy.config)
    own = settings.policy.temperature
    with tempfile.TemporaryDirectory(prefix="megatron-rl-mismatch-") as folder, together():
        search = Search(settings, launch, wanted.longest, wanted.tolerance, architecture, own, wanted.drawn_at, Path(folder))
        tell("the server samples, and scores what it sampled")
        search.observe(hands.observe() if hands is not None else None)
        tell("the policy scores")
        replay = [Ask(wanted.drawn_at, replay=True)] if architecture.is_moe else []
        live = search.ask(Ask(own), Ask(wanted.drawn_at), Ask(1.0), *replay)[0]
        audit = layer_audit(settings, architecture, search.facts)
        search.stages.append(search.stage("as it is", f"log-probs at temperature {own:g}, routers choose by themselves", live))
        parts = _follow(search, hands, wanted, tell)
    return Report(
        policy=_policy_json(settings),
        server=_server_json(search.observation),
        stages=search.stages,
        aside=search.aside,
        causes=search.causes,
        layers=search.layers,
        notes=[*search.notes.values(), *audit.remarks],
        quantized=audit.summary(),
        problems=audit.problems,
        differing=[part.title for part in parts if part.differed],
    )


def _follow(search: Search, hands: Hands | None, wanted: Wanted, tell: Tell) -> list[Part]:
    """Step by step until nothing is left to explain; returns what was found of the weights."""
    search.aside.append(_handed_over(search))
    _told_alike(search, tell)
    replayed = _replayed(search)
    if not search.done and replayed is not None and replayed.within:
        search.take(replayed, "routing", _routing_text(search, replayed))
    parts: list[Part] = []
    if not search.done:
        parts = _weights(search, hands, wanted, tell)
        if any(part.differed for part in parts):
            _told_alike(search, tell)
        replayed = _replayed(search) if parts else replayed
    if not search.done and replayed is not None:
        search.take(replayed, "routing", _routing_text(search, replayed))
    if not search.done and (parts or all(cause.name != "stale weights" for cause in search.causes)):
        _rest(search, compared_weights=bool(parts))
    if replayed is not None and replayed not in search.stages:
        search.aside.append(replayed)
    return parts


# -- the steps -------------------------------------------------------------------------------------------------------------


def _handed_over(search: Search) -> Stage:
    """What the server says of tokens handed to it whole: other kernels than those it samples with, and no temperature."""
    (at_one,) = search.ask(Ask(1.0))
    text = "the same tokens handed to the server whole, both sides at temperature 1"
    return search.stage("handed over", text, at_one, given=True)


def _told_alike(search: Search, tell: Tell) -> None:
    """What the policy can be told to do as the server does: at its temperature, by its config.json, in its number format."""
    if not search.done:
        _temperature(search)
    if not search.done:
        _config(search, tell)
    if not search.done:
        _precision(search, tell)


def _temperature(search: Search) -> None:
    """The server's numbers may be of another temperature than the policy's: as told, which is a cause, or as tried."""
    ours, theirs = search.temperature, search.drawn_at
    if ours != theirs:
        (answer,) = search.ask(Ask(theirs))
        stage = search.stage("temperature", f"the policy's log-probs at temperature {theirs:g} too", answer)
        said = (
            f"The temperature: the server samples at {theirs:g} and the policy takes log-probs at {ours:g}. "
            f"Set policy.temperature={theirs:g}, or sample at {ours:g}."
        )
        search.take(stage, "temperature", said, anyway=True)
        search.temperature = theirs
    elif _handed_over(search).compared.mean <= HELPS * search.current.compared.mean:
        answers = search.ask(*map(Ask, TEMPERATURES))
        tried = [
            (search.stage("temperature", f"the policy's log-probs at temperature {value:.2g}", answer), value)
            for value, answer in zip(TEMPERATURES, answers, strict=True)
        ]
        stage, value = min(tried, key=lambda each: each[0].compared.mean)
        said = (
            "The temperature: the server says of tokens handed to it what the policy does, and not of those that it samples. "
            f"They are as if sampled at about {value:.2g}, and {theirs:g} was asked for: look for what changes it on the way."
        )
        if search.take(stage, "temperature", said):
            search.temperature = value


def _config(search: Search, tell: Tell) -> None:
    """The server may read another config.json: another rotary base, epsilon, scaling of the experts."""
    theirs = served_architecture(search.facts)
    if theirs is None:
        search.notes["config"] = (
            f"{search.facts.model} cannot be read from here, so the server's config.json was not compared with the policy's."
        )
        return
    found = config_differences(search.architecture, theirs)
    if not found:
        return
    tell("the policy scores with the server's config.json")
    former = search.change(_changed(search.settings, "policy", config=write_config(search.facts, search.folder)))
    (answer,) = search.ask(Ask(search.temperature))
    listed = "; ".join(found)
    stage = search.stage("config", f"the policy built from the server's config.json ({listed})", answer)
    if search.take(stage, "config", f"config.json: both sides have the same weights and read them differently: {listed}."):
        search.architecture = theirs
        search.notes.pop("config", None)
    else:
        search.put_back(former)
        search.notes["config"] = f"The server reads another config.json ({listed}), which does not explain the difference."


def _precision(search: Search, tell: Tell) -> None:
    """The server may compute in another number format."""
    ours, theirs = format_of(search.settings), search.facts.format
    if ours == theirs:
        return
    if theirs not in FINENESS:
        search.notes["precision"] = (
            f"The server computes in {theirs}, which the policy does not have, so what that does is among what remains. Serve "
            "it in bfloat16 or float32 (--dtype) to see."
        )
        return
    changed = _changed(search.settings, "precision", **as_served(search.facts))
    try:
        require_valid(changed, search.architecture, search.launch.world_size)
    except SettingsError as error:
        search.notes["precision"] = (
            f"The policy cannot compute in the server's format, {theirs}, so this was not tried: {error}"
        )
        return
    tell(f"the policy scores in {theirs}, as the server does")
    (before,) = search.ask(Ask(search.temperature))
    former = search.change(changed)
    (after,) = search.ask(Ask(search.temperature))
    rounding = _moved(search, before, after)
    stage = search.stage("precision", f"the policy in {theirs}, as the server", after)
    said = (
        f"The number format: the policy computes in {ours} and the server in {theirs}, which alone moves the policy's own "
        f"log-probs by {number(rounding)} on average. Give both the same (precision.dtype, precision.fp8; --dtype)."
    )
    like = search.current.compared.mean <= LIKE_ROUNDING * rounding
    if not search.take(stage, "precision", said, anyway=like):
        search.put_back(former)


def _replayed(search: Search) -> Stage | None:
    """The same with the server's routing."""
    if not search.replayable:
        if search.architecture.is_moe and not search.done:
            search.notes["routing"] = (
                "The server does not return its routing, so that was not replayed: start it with enable_return_routed_experts."
            )
        return None
    (answer,) = search.ask(Ask(search.temperature, replay=True))
    return search.stage("routing", "the server's choice of experts repeated in the policy (R3)", answer)


def _routing_text(search: Search, replayed: Stage) -> str:
    compared = search.current.compared
    share = f"{1 - compared.agree.mean():.1%} of choices" if compared.agree is not None else "choices"
    return (
        f"Routing: routers of policy and server choose other experts ({share}, by token and layer), and repeating the server's "
        f"brings mean |Δlogp| from {number(compared.mean)} to {number(replayed.compared.mean)}. "
        "Set objective.routing_replay=rollout (R3)."
    )


def _weights(search: Search, hands: Hands | None, wanted: Wanted, tell: Tell) -> list[Part]:
    """The server may have other weights: they are sent again, and a part that changes its scores had been another."""
    before, unsent = search.facts.version, _unsent(search, wanted)
    if unsent is not None:
        if wanted.step is not None and before is not None and before != wanted.step:
            said = (
                f"Stale weights: the server says that it has those of step {before}; the checkpoint is of step {wanted.step}."
            )
            search.causes.append(Cause("stale weights", said, search.current.compared.mean, 0.0))
        search.notes["weights"] = f"Weights were not compared: {unsent}"
        return []
    tell("the checkpoint's weights are sent to the server, part by part")
    search.observe(hands.resend(search.observation) if hands is not None else None)
    (live,) = search.ask(Ask(search.temperature))
    parts = search.observation.parts
    differing = [part for part in parts if part.differed]
    if not differing:
        search.notes["weights"] = f"All weights are the checkpoint's: none of {len(parts)} parts sent again changed the scores."
        return parts
    stage = search.stage(
        "weights", f"the checkpoint's weights sent to the server: {len(differing)} of {len(parts)} differed", live
    )
    names = ", ".join(part.title for part in differing[:SHOWN]) + (", …" if len(differing) > SHOWN else "")
    if len(differing) > MANY * len(parts):
        told = f" (it calls them version {before})" if before is not None else ""
        said = f"Stale weights: {len(differing)} of {len(parts)} parts were not the checkpoint's{told}. Publish to the server."
        search.take(stage, "stale weights", said, anyway=True)
    else:
        said = f"Wrong tensors: all weights but these were the checkpoint's: {names}. Look at how they are converted and sent."
        search.take(stage, "wrong tensors", said, anyway=True)
    return parts


def _unsent(search: Search, wanted: Wanted) -> str | None:
    """Why weights cannot be sent to the server."""
    if not wanted.may_send:
        return "that means to send the checkpoint's to the server, which then has them. Allow it with --resend."
    if search.facts.online is not None and search.facts.quantization is None:
        return (
            f"the server makes its own numbers of them as it loads (--quantization {search.facts.online}), and takes no others."
        )
    try:
        fp8_quantizer(WeightMap(search.architecture), search.facts.quantization)
    except SettingsError as error:
        return str(error)
    return None


def _rest(search: Search, *, compared_weights: bool) -> None:
    compared = search.current.compared
    tried = ["temperature", "config.json", "number format", "routing", *(["weights"] if compared_weights else [])]
    text = "What remains" if search.causes else f"The cause is none of these: {', '.join(tried)}"
    where = (
        " It grows along the sequence: look at positions (rotary embedding, context length)."
        if growth(compared) > GROWS
        else ""
    )
    left = "kernels" if compared_weights else "weights, which were not compared, to kernels"
    said = f"{text}: mean |Δlogp| {number(compared.mean)} is left to {left}, and to what could not be made equal.{where}"
    search.causes.append(Cause("kernels" if compared_weights else "weights or kernels", said, compared.mean, 0.0))


# -- facts -----------------------------------------------------------------------------------------------------------------


def layer_audit(settings: Settings, architecture: Architecture, facts: Facts) -> LayerAudit:
    """Which layers each side computes in FP8."""
    weight_map = WeightMap(architecture)
    served = served_layers(weight_map, facts.quantization, facts.online)
    return audit_layers(weight_map, settings.precision, served)


def config_differences(ours: Architecture, theirs: Architecture) -> list[str]:
    """What matters to log-probs and is not the same: `rope.base is 1000 for the policy and 10000 for the server`."""
    if {n: e.shape for n, e in WeightMap(ours).hf.items()} != {n: e.shape for n, e in WeightMap(theirs).hf.items()}:
        raise SettingsError("the server's model has other tensors than the policy's: these are not the same model")
    mine, its = _flat(asdict(ours)), _flat(asdict(theirs))
    names = [name for name in mine | its if name.partition(".")[0] not in OF_NO_MATTER and mine.get(name) != its.get(name)]
    return [f"{name} is {_plain(mine.get(name))} for the policy and {_plain(its.get(name))} for the server" for name in names]


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def as_served(facts: Facts) -> dict[str, Any]:
    """The section `precision` of a policy that computes as the server does, as nearly as it can."""
    if facts.format == "fp8":
        blocks = (facts.quantization or {}).get("weight_block_size")
        return {"dtype": "bfloat16", "fp8": "simulated", "fp8_recipe": "blockwise" if blocks else "tensorwise"}
    return {"dtype": facts.dtype, "fp8": "off"}


def _changed(settings: Settings, section: str, **values: Any) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def _moved(search: Search, before: Answer, after: Answer) -> float:
    """Mean |difference| of the policy's own log-probs of the sampled tokens."""
    pairs = zip(search.observation.drawn, before.log_probs, after.log_probs, strict=True)
    return float(np.abs(np.concatenate([(a - b)[each.response] for each, a, b in pairs])).mean())


def _policy_json(settings: Settings) -> dict[str, Any]:
    return {
        "init": str(settings.policy.init),
        "config": str(settings.policy.config),
        "temperature": settings.policy.temperature,
        **settings.precision.model_dump(mode="json"),
    }


def _server_json(observation: Observation) -> dict[str, Any]:
    facts = asdict(observation.facts)
    del facts["config"]
    return {**facts, "temperature": observation.temperature}

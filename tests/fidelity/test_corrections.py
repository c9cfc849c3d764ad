"""Corrections of the mismatch, through the trainer, on what a perturbed server sampled: exact numbers against plain loops."""

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from megatron_rl.config.settings import Settings
from megatron_rl.fidelity.server import draw
from megatron_rl.objectives.base import ObjectiveResult, TokenBatch
from megatron_rl.policy.group_pass import prepare_groups
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.sealed import SealedStep
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.train import objective
from megatron_rl.train.learner import Learner, LearnReport
from megatron_rl.types import Group, Prompt, Sample, Segment
from megatron_rl.types import Sequence as TokenSequence
from tests.fidelity.planted import changed, older, serve, weights_of
from tests.policy.single import opened
from tests.servers import VOCABULARY, TinyServer

GROUPS, SIZE, TOKENS = 3, 3, 12
WIDE = {"clip_low": 0.9, "clip_high": 9.0}  # nothing is clipped
CLOSE = 2e-5  # of sums in float32


@dataclass(frozen=True)
class Row:
    """A sample, as a loop sees it."""

    rollout: list[float]  # of its response's tokens, by the server
    policy: list[float]  # by the policy
    advantage: float
    start: int
    length: int

    @property
    def ratios(self) -> list[float]:
        return [math.exp(own - told) for own, told in zip(self.policy, self.rollout, strict=True)]

    @property
    def mean(self) -> float:
        """The mean of log ρ."""
        return sum(own - told for own, told in zip(self.policy, self.rollout, strict=True)) / len(self.rollout)


@dataclass(frozen=True)
class Scene:
    """Samples of a server whose weights are not the policy's; the policy, whose learning rate is zero."""

    rows: SealedStep
    policy: Policy
    seen: list[Row]


@pytest.fixture(scope="module")
def scene(tiny_server: TinyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("corrections")
    serve(tiny_server, changed(tiny_server.model, folder / "older", older(weights_of(tiny_server.model), 0.05)))
    prompts = np.random.default_rng(0).integers(3, VOCABULARY - 1, (GROUPS, 8)).tolist()

    async def sampled() -> list[Any]:
        async with tiny_server.client() as client:
            return await draw(client, [prompt for prompt in prompts for _ in range(SIZE)], TOKENS, 1.0, None)

    drawn = asyncio.run(sampled())
    serve(tiny_server, tiny_server.model)
    settings = Settings.model_validate(
        {
            "policy": {"init": tiny_server.model},
            "precision": {"dtype": "float32"},
            "optimizer": {"lr": 0.0, "weight_decay": 0.0},
            "batch": {"max_tokens": 64},
        }
    )
    with opened(settings) as policy:
        moved = moves(policy, drawn)
        with Bank(folder / "bank") as bank:
            for number, prompt in enumerate(prompts):
                samples = []
                group = slice(number * SIZE, (number + 1) * SIZE)
                ranks = np.argsort(np.argsort(moved[group]))  # the worst is the one that the policy moved away from most
                for each, reward in zip(drawn[group], map(float, ranks), strict=True):
                    told = np.concatenate([np.zeros(each.prompt, np.float32), each.reported])
                    segments = (Segment(0, each.prompt, "prompt"), Segment(each.prompt, len(each.tokens), "policy", 0))
                    samples.append(Sample(each.tokens, told, segments, "length", {"exact": reward}, reward))
                bank.append(Group(f"g{number}", Prompt(f"p{number}", np.array(prompt)), tuple(samples), 0))
            bank.seal(0)
        with BankReader(folder / "bank") as reader:
            rows = reader.step(0)
            yield Scene(rows, policy, looked_at(policy, rows))


def moves(policy: Policy, drawn: list[Any]) -> list[float]:
    """Of each response: the mean of the policy's log-probs less those of the server."""
    masks = [np.arange(len(each.tokens)) >= each.prompt for each in drawn]
    packs = policy.pack([TokenSequence(i, each.tokens, masks[i]) for i, each in enumerate(drawn)])
    own = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
    return [float(np.mean(own[i][masks[i]] - each.reported)) for i, each in enumerate(drawn)]


def looked_at(policy: Policy, rows: SealedStep) -> list[Row]:
    samples = rows.samples(range(rows.rows))
    packs = policy.pack([TokenSequence(i, sample.tokens, sample.loss_mask) for i, sample in enumerate(samples)])
    own = policy.per_sequence(packs, [values.log_probs for values in policy.log_probs(packs)])
    rewards = [sample.reward for sample in samples]
    found = []
    for i, sample in enumerate(samples):
        group = rewards[i // SIZE * SIZE : (i // SIZE + 1) * SIZE]
        mean = sum(group) / SIZE
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in group) / (SIZE - 1))
        mask = sample.loss_mask
        told, ours = sample.log_probs[mask].astype(np.float64), own[i][mask].astype(np.float64)
        start = int(np.flatnonzero(mask)[0])
        found.append(Row(told.tolist(), ours.tolist(), (rewards[i] - mean) / (spread + 1e-6), start, len(sample.tokens)))
    return found


def learned(scene: Scene, **sections: Any) -> LearnReport:
    settings = Settings.model_validate({**scene.policy.settings.model_dump(exclude={"objective"}), "objective": sections})
    goal, advantage = objective.build(settings.objective)
    return Learner(scene.policy, goal, advantage, settings).learn(0, scene.rows)


class Hand:
    """A loss with one number a token: −Σ_t number_t · new_t."""

    needs_entropy = False

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        return ObjectiveResult(-batch.sum_sequences(batch.columns["number"] * batch.log_probs).sum(), {})


def gradient_norm(scene: Scene, numbers: list[list[float]]) -> float:
    """Of the loss whose derivative by each token's log-prob is given, less its sign."""
    sequences = []
    for i, (row, sample) in enumerate(zip(scene.seen, scene.rows.samples(range(scene.rows.rows)), strict=True)):
        column = np.zeros(row.length, np.float32)
        column[row.start :] = numbers[i]
        sequences.append(TokenSequence(i, sample.tokens, sample.loss_mask, columns={"number": column}))
    return scene.policy.update(scene.policy.pack(sequences), Hand()).grad_norm


def between(values: list[float], share: float) -> float:
    """A bound that so large a share of the values is below, with a gap on both sides."""
    ordered = sorted(values)
    place = int(share * len(ordered))
    return (ordered[place - 1] + ordered[place]) / 2


def token_bounds(rows: list[Row]) -> tuple[float, float]:
    ratios = [ratio for row in rows for ratio in row.ratios]
    return between(ratios, 0.3), between(ratios, 0.7)


def sequence_bounds(rows: list[Row]) -> tuple[float, float]:
    means = [math.exp(row.mean) for row in rows]
    return between(means, 0.25), between(means, 0.75)


def tis(rows: list[Row]) -> tuple[dict[str, Any], Callable[[Row], list[float]], dict[str, float]]:
    cap = token_bounds(rows)[1]
    cut = [ratio > cap for row in rows for ratio in row.ratios]
    return {"cap": cap}, lambda row: [min(ratio, cap) for ratio in row.ratios], {"tis_cut": sum(cut) / len(cut)}


def icepop(rows: list[Row]) -> tuple[dict[str, Any], Callable[[Row], list[float]], dict[str, float]]:
    low, high = token_bounds(rows)
    out = [not low <= ratio <= high for row in rows for ratio in row.ratios]
    kept = lambda row: [ratio if low <= ratio <= high else 0.0 for ratio in row.ratios]  # noqa: E731
    return {"low": low, "high": high}, kept, {"icepop_dropped": sum(out) / len(out)}


@pytest.mark.parametrize("weight", [tis, icepop], ids=["tis", "icepop"])
def test_token_weights(weight: Callable[..., Any], scene: Scene) -> None:
    """With GRPO, whose ratio is 1 in the first update: J_t = A_i, loss = −(1/N) Σ_i (1/L_i) Σ_t f_it A_i."""
    options, factors, told = weight(scene.seen)
    report = learned(
        scene,
        surrogate="grpo",
        options={"clip_low": 0.2, "clip_high": 0.2},
        weights=[{"name": weight.__name__, "options": options}],
    )
    count = len(scene.seen)
    numbers = [[f * row.advantage / len(row.rollout) / count for f in factors(row)] for row in scene.seen]
    assert report.metrics["loss"] == pytest.approx(-sum(map(sum, numbers)), abs=CLOSE)
    assert report.updates[0].grad_norm == pytest.approx(gradient_norm(scene, numbers), rel=1e-4)
    for name, value in told.items():
        assert 0 < value < 1 and report.metrics[name] == pytest.approx(value, abs=1e-6)


def geometric(rows: list[Row]) -> tuple[str, dict[str, Any], list[float], str]:
    found = [math.exp(row.mean) for row in rows]
    return "sequence_weight", {"form": "geometric"}, found, "sequence_weight"


def product(rows: list[Row]) -> tuple[str, dict[str, Any], list[float], str]:
    cap = between([math.exp(row.mean * len(row.rollout)) for row in rows], 0.7)
    found = [min(math.exp(row.mean * len(row.rollout)), cap) for row in rows]
    return "sequence_weight", {"form": "product", "cap": cap}, found, "sequence_weight"


def masked(rows: list[Row]) -> tuple[str, dict[str, Any], list[float], str]:
    low, high = sequence_bounds(rows)
    found = [float(low <= math.exp(row.mean) <= high) for row in rows]
    return "geometric_mask", {"low": low, "high": high}, found, "geometric_mask_dropped"


@pytest.mark.parametrize("weight", [geometric, product, masked])
def test_sequence_weights(weight: Callable[..., Any], scene: Scene) -> None:
    """With GSPO, whose ratio is 1 in the first update: loss = −(1/N) Σ_i f_i A_i, gradient by a token −f_i A_i / (N L_i)."""
    name, options, factors, metric = weight(scene.seen)
    report = learned(scene, surrogate="gspo", options=WIDE, weights=[{"name": name, "options": options}])
    count = len(scene.seen)
    numbers = [
        [f * row.advantage / len(row.rollout) / count] * len(row.rollout) for f, row in zip(factors, scene.seen, strict=True)
    ]
    assert report.metrics["loss"] == pytest.approx(-sum(map(sum, numbers)), abs=CLOSE)
    assert report.updates[0].grad_norm == pytest.approx(gradient_norm(scene, numbers), rel=1e-4)
    told = sum(factors) / count if metric == "sequence_weight" else 1 - sum(factors) / count
    assert report.metrics[metric] == pytest.approx(told, rel=1e-5)
    assert len({round(f, 6) for f in factors}) > 1


def test_opsm(scene: Scene) -> None:
    """`old` is the server's own here, so that the policy has moved away from it: bad responses that fell too far go."""
    bad = [-row.mean for row in scene.seen if row.advantage < 0]  # mean(old − new)
    delta = between([0.0, *(fall for fall in bad if fall > 0)], 0.5)
    kept = [float(not (row.advantage < 0 and -row.mean > delta)) for row in scene.seen]
    assert 0 < sum(kept) < len(kept)
    opsm = {"name": "opsm", "options": {"delta": delta}}
    report = learned(scene, surrogate="gspo", options=WIDE, weights=[opsm], old_log_probs="rollout")
    count = len(scene.seen)
    values = [f * math.exp(row.mean) * row.advantage / count for f, row in zip(kept, scene.seen, strict=True)]
    numbers = [[value / len(row.rollout)] * len(row.rollout) for value, row in zip(values, scene.seen, strict=True)]
    assert report.metrics["loss"] == pytest.approx(-sum(values), abs=CLOSE)
    assert report.updates[0].grad_norm == pytest.approx(gradient_norm(scene, numbers), rel=1e-4)
    assert report.metrics["opsm_dropped"] == pytest.approx(1 - sum(kept) / count)


SETTINGS: dict[str, dict[str, Any]] = {
    "off": {"options": WIDE},
    "one step a rollout": {"on_policy": True},
    "old is the rollout's": {"options": WIDE, "old_log_probs": "rollout"},
    "no old at all": {"surrogate": "agro", "options": {}, "advantage": None, "reference": "none"},
    "corrected": {"options": WIDE, "weights": [{"name": "geometric_mask"}]},
}


@pytest.mark.parametrize("sections", SETTINGS.values(), ids=SETTINGS)
def test_the_mismatch_is_reported_whatever_is_set(sections: dict[str, Any], scene: Scene) -> None:
    """Corrections off, on, or nothing to correct: the numbers are those of policy and server."""
    if sections.get("surrogate") == "agro":
        goal, _ = objective.build(scene.policy.settings.objective.model_copy(update={**sections, "reference": "initial"}))
        samples = scene.rows.samples(range(scene.rows.rows))
        found = reported_without_old(scene, goal, samples)
    else:
        found = dict(learned(scene, **sections).metrics)
    x = np.array([own - told for row in scene.seen for own, told in zip(row.policy, row.rollout, strict=True)])
    ratio, means = np.exp(x), [row.mean for row in scene.seen]
    expected = {
        "mismatch_k1": -x.mean(),
        "mismatch_k3": (np.expm1(x) - x).mean(),
        "mismatch_chi2": (ratio**2 - 1).mean(),
        "mismatch_max": np.abs(x).max(),
        "mismatch_effective_share": ratio.sum() ** 2 / (len(x) * (ratio**2).sum()),
        "mismatch_perplexity_ratio": np.exp([-mean for mean in means]).mean(),
    }
    assert expected["mismatch_k3"] > 1e-3
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def reported_without_old(scene: Scene, goal: Any, samples: list[Sample]) -> dict[str, float]:
    """AGRO compares with the reference alone, which is the policy itself here."""
    sequences = [
        TokenSequence(
            i, sample.tokens, sample.loss_mask, columns={"rollout": sample.log_probs, "reference": reference_of(scene, i)},
            scalars={"reward": sample.reward}, group=i // SIZE,
        )
        for i, sample in enumerate(samples)
    ]  # fmt: skip
    packs = scene.policy.pack(sequences)
    return dict(scene.policy.update(prepare_groups(scene.policy, packs, goal, {}), goal).metrics)


def reference_of(scene: Scene, index: int) -> np.ndarray:
    row = scene.seen[index]
    return np.concatenate([np.zeros(row.start), row.policy]).astype(np.float32)

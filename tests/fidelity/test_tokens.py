"""Numbers of a comparison against plain loops: alignment, bins, routing agreement; what is sent at once; tolerances."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.config.families import read_architecture
from megatron_rl.fidelity.report import Tolerance
from megatron_rl.fidelity.tokens import Compared, Drawn, by_position, by_probability, by_routing, growth
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.compare import parts
from tests.reference.tiny import write_tiny_config

LAYERS = [1, 3]  # those of four that have experts


def made_up(seed: int) -> tuple[list[Drawn], list[np.ndarray], list[np.ndarray]]:
    """Drawn responses, log-probs by the policy, and its routes."""
    generator = np.random.default_rng(seed)
    drawn, ours, routes = [], [], []
    for length, prompt in ((9, 3), (14, 5), (4, 1)):
        told = -generator.exponential(2.0, length - prompt).astype(np.float32)
        routing = generator.random((length - 1, 4, 6)).argsort(-1)[..., :2].astype(np.uint8)
        drawn.append(Drawn(np.arange(length), prompt, told, -generator.random(length).astype(np.float32), routing))
        ours.append(-generator.exponential(2.0, length).astype(np.float32))
        own = np.concatenate([routing, routing[-1:]])[:, LAYERS].astype(np.int64)[..., ::-1].copy()  # another order
        own[generator.random((length, 2)) < 0.4] = (7, 8)  # no experts of the server's
        routes.append(own)
    return drawn, ours, routes


def test_every_token_against_a_loop() -> None:
    drawn, ours, routes = made_up(0)
    found = Compared.of(drawn, ours, routes, layers=LAYERS)
    rows = []
    for each, own, chosen in zip(drawn, ours, routes, strict=True):
        assert each.routing is not None
        for place in range(each.prompt, len(each.tokens)):
            told = float(each.reported[place - each.prompt])
            same = [set(chosen[place - 1][k]) == set(each.routing[place - 1][layer]) for k, layer in enumerate(LAYERS)]
            rows.append((float(own[place]) - told, told, place, same))
    assert found.difference.tolist() == [row[0] for row in rows]
    assert found.position.tolist() == [row[2] for row in rows]
    assert found.agree is not None and found.agree.tolist() == [row[3] for row in rows]
    sizes = [abs(row[0]) for row in rows]
    assert found.mean == pytest.approx(sum(sizes) / len(sizes)) and found.largest == max(sizes)
    assert found.kl == pytest.approx(sum(math.exp(row[0]) - 1 - row[0] for row in rows) / len(rows))
    for k, line in enumerate(by_routing(found, LAYERS)):
        others = [size for size, row in zip(sizes, rows, strict=True) if not row[3][k]]
        kept = [size for size, row in zip(sizes, rows, strict=True) if row[3][k]]
        assert line["layer"] == LAYERS[k] and line["differs"] == len(others) / len(rows)
        assert line["other"] == pytest.approx(np.mean(others)) and line["same"] == pytest.approx(np.mean(kept))
    given = Compared.of(drawn, ours, given=True)
    assert given.theirs.tolist() == [float(v) for each in drawn for v in each.given[each.prompt :]] and given.agree is None


def total(sizes: Sequence[float]) -> tuple[int, float]:
    return len(sizes), max(sizes)


def test_bins_hold_every_token_once() -> None:
    found = Compared.of(*made_up(1)[:2])
    for bins, inside in (
        (by_position(found), {"2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-16": (9, 16), "1": (0, 1)}),
        (by_probability(found), {f"≤ {high:g}": (low, high) for low, high in ((0.5, 0.9), (0.1, 0.5), (0.01, 0.1))}),
    ):
        assert sum(each.tokens for each in bins) == len(found.difference)
        values = found.position if "1" in inside else np.exp(found.theirs)
        checked = 0
        for each in bins:
            if each.name in inside:
                low, high = inside[each.name]
                chosen = [s for s, v in zip(found.size, values, strict=True) if low < v <= high or ("1" in inside and v == low)]
                assert (each.tokens, each.max) == total(chosen) and each.mean == pytest.approx(np.mean(chosen))
                checked += 1
        assert checked > 1


def test_what_is_not_a_number_is_no_agreement() -> None:
    drawn, ours, _ = made_up(2)
    ours[0][5] = np.nan
    found = Compared.of(drawn, ours)
    assert found.largest == math.inf and not Tolerance.of("fp8", "fp8", None).holds(found)


def test_growth_along_the_sequence() -> None:
    position = np.arange(40)
    noise = np.random.default_rng(0).random(40)
    rising = Compared(0.1 * position * (0.5 + noise), -np.ones(40), position)
    assert growth(rising) > 0.7 and abs(growth(Compared(noise, -np.ones(40), position))) < 0.3
    assert growth(Compared(np.zeros(40), -np.ones(40), position)) == 0


def test_the_finer_format_says_what_is_allowed() -> None:
    """That one side rounds more is a cause and no excuse."""
    assert Tolerance.of("float32", "bfloat16", None).mean == Tolerance.of("float32", "float32", None).mean == 1e-4
    for ours, theirs in (("bfloat16", "fp8"), ("bfloat16", "float16"), ("fp8", "float16"), ("fp8", "half")):
        assert Tolerance.of(ours, theirs, None).mean == 0.05
    assert Tolerance.of("fp8", "fp8", None).mean == 0.25 and Tolerance.of("fp8", "fp8", 0.1).largest == pytest.approx(10)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama"])
def test_weights_are_sent_each_once_and_not_too_many_times(family: str, tmp_path: Path) -> None:
    weight_map = WeightMap(read_architecture(write_tiny_config(family, tmp_path)))
    counts = []
    for most in (10_000, 100, 40):
        found = parts(weight_map, most)
        assert sorted(name for names in found for name in names) == sorted(weight_map.hf)
        counts.append(len(found))
    assert counts == sorted(counts, reverse=True) and counts[-1] <= 40
    for names in parts(weight_map, 10_000):  # one tensor each, but for what a server fuses out of one sending
        assert len(names) == 1 or {name.split(".")[-2] for name in names} == {"q_a_proj", "kv_a_proj_with_mqa"}

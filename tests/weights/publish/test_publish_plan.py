"""The plan of a publish, for random models, bucket sizes and layouts: everything travels once, together with what it must."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import smallest_world_size
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.publish.live import LiveWeights
from megatron_rl.weights.publish.plan import (
    Unit,
    families,
    fill_buckets,
    plan_files,
    plan_stream,
    senders,
    tensor_bytes,
    units,
)
from tests.reference.tiny import TINY, write_tiny_config

# What SGLang fuses when it meets the parts in one call: they may not be parted. (srt/models: stacked_params_mapping,
# expert_params_mapping; deepseek_common/deepseek_weight_loader.py: cached_a_proj.)
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
LAYOUTS: tuple[dict[str, int], ...] = (
    {},
    {"tensor": 2},
    {"expert": 2},
    {"pipeline": 2},
    {"tensor": 2, "expert": 2, "pipeline": 2},
    {"tensor": 2, "expert_tensor": 2, "expert": 2},
)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WeightMap]:
    folder = tmp_path_factory.mktemp("configs")
    return {family: WeightMap(read_architecture(write_tiny_config(family, folder))) for family in TINY}


def live(weight_map: WeightMap, layout: LayoutSettings, ranks: int) -> LiveWeights:
    return LiveWeights(weight_map, layout, ranks, list, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", TINY)
def test_units_hold_everything_once_and_keep_together_what_is_fused(family: str, maps: dict[str, WeightMap]) -> None:
    weight_map = maps[family]
    cut = units(weight_map, torch.bfloat16)
    assert Counter(name for unit in cut for name in unit.names) == Counter(list(weight_map.hf))
    for unit in cut:
        assert unit.bytes == sum(tensor_bytes(weight_map, name, torch.bfloat16) for name in unit.names)
    home = {name: unit for unit in cut for name in unit.names}
    for group in FUSED:
        for name in weight_map.hf:
            for part in group:
                for other in group:
                    partner = name.replace(f".{part}.", f".{other}.")
                    if partner in home:
                        assert home[partner] is home[name], f"{name} and {partner} are parted"


@pytest.mark.parametrize("family", TINY)
def test_kinds_hold_everything_once(family: str, maps: dict[str, WeightMap]) -> None:
    kinds = families(maps[family])
    assert Counter(name for names in kinds.values() for name in names) == Counter(list(maps[family].hf))
    assert next(iter(kinds)) == "model.embed_tokens.weight"
    assert all(".layers.*." in kind for kind in kinds if ".layers." in kind)
    assert all(".experts.*." in kind for kind in kinds if ".experts." in kind)
    units_of_kinds = [units(maps[family], torch.float32, names) for names in kinds.values()]
    assert sum(len(unit.names) for cut in units_of_kinds for unit in cut) == len(maps[family].hf)


@given(sizes=st.lists(st.integers(1, 100), max_size=60), limit=st.integers(1, 150))
def test_buckets(sizes: list[int], limit: int) -> None:
    """Order is kept, nothing is lost, a bucket is too large only when a unit is, and no two neighbours would fit in one."""
    given_units = [Unit((str(number),), size) for number, size in enumerate(sizes)]
    filled = fill_buckets(given_units, limit)
    assert [name for bucket in filled for name in bucket.names] == [str(number) for number in range(len(sizes))]
    for bucket in filled:
        assert bucket.bytes == sum(sizes[int(name)] for name in bucket.names)
        assert bucket.bytes <= limit or len(bucket.names) == 1
    for before, after in itertools.pairwise(filled):
        assert before.bytes + sizes[int(after.names[0])] > limit


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_streams_and_files(data: st.DataObject, maps: dict[str, WeightMap]) -> None:
    family = data.draw(st.sampled_from(sorted(TINY)))
    weight_map = maps[family]
    whole = units(weight_map, torch.float32)
    limit = data.draw(st.integers(1000, 400_000))
    largest = max(limit, max(unit.bytes for unit in whole))
    total = sum(unit.bytes for unit in whole)

    receivers = data.draw(st.sets(st.integers(0, 31), min_size=1, max_size=4))
    stream = plan_stream(whole, limit, receivers)
    assert stream.bytes == total and stream.largest <= largest
    for rank in receivers:  # all get the same buckets, each tensor once
        assert Counter(name for each in stream.rounds for name in each[rank]) == Counter(list(weight_map.hf))
    assert all(each.keys() == receivers and len(set(each.values())) == 1 for each in stream.rounds)

    wanted = dict(data.draw(st.sampled_from(LAYOUTS)))
    if weight_map.architecture.experts is None:
        wanted = {name: size for name, size in wanted.items() if not name.startswith("expert")}
    layout = LayoutSettings(**wanted)
    ranks = smallest_world_size(layout) * data.draw(st.sampled_from([1, 2, 3]))
    shares = live(weight_map, layout, ranks).shares()
    files = plan_files(whole, limit, shares, ranks)
    assert Counter(name for each in files.rounds for names in each.values() for name in names) == Counter(list(weight_map.hf))
    assert files.bytes == total and files.largest <= largest
    load = Counter[int]()
    for each in files.rounds:
        for rank, names in each.items():
            load[rank] += sum(tensor_bytes(weight_map, name, torch.float32) for name in names)
            for unit in whole:
                if unit.names[0] in names:
                    assert set(unit.names) <= set(names)
                    at_hand = [sum(shares[name].get(other, 0) for name in unit.names) for other in range(ranks)]
                    assert at_hand[rank] == max(at_hand)  # nobody is sent what another has more of
    if ranks == 1:
        assert load == {0: total}


@pytest.mark.parametrize("wanted", LAYOUTS)
def test_shares_are_what_ranks_hold(wanted: dict[str, int], maps: dict[str, WeightMap]) -> None:
    """Every number of every tensor is held by as many ranks as there are replicas; ranks hold equal parts of what is cut."""
    layout = LayoutSettings(**wanted)
    weight_map = maps["qwen3_moe"]
    ranks = smallest_world_size(layout)
    shares = live(weight_map, layout, ranks).shares()
    for name, entry in weight_map.hf.items():
        assert max(shares[name].values()) <= math.prod(entry.shape) <= sum(shares[name].values()), name
    q = shares["model.layers.0.self_attn.q_proj.weight"]
    assert set(q.values()) == {math.prod(weight_map.hf["model.layers.0.self_attn.q_proj.weight"].shape) // layout.tensor}


@given(servers=st.integers(1, 40), ranks=st.integers(1, 64), most=st.integers(1, 16))
def test_senders(servers: int, ranks: int, most: int) -> None:
    chosen = senders(servers, ranks, most)
    assert len(chosen) == servers and all(0 <= rank < ranks for rank in chosen)
    used = Counter(chosen)
    assert len(used) == min(servers, ranks, most)
    assert max(used.values()) - min(used.values()) <= 1
    assert 0 in used

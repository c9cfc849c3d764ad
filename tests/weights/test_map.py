"""The map names everything once, in both directions, and agrees with transformers and with the models that Megatron builds."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.config.families import read_architecture
from megatron_rl.config.layout_map import rank_coordinates, smallest_world_size
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.policy.slices import model_slices
from megatron_rl.weights.families import TABLES
from megatron_rl.weights.families.table import Form
from megatron_rl.weights.map import WeightMap, form_of
from tests.policy.single import opened, tiny_settings
from tests.reference.tiny import TINY, write_tiny_config

FORMS: tuple[Form, ...] = ("published", "stacked")


def map_of(family: str, folder: Path, form: Form = "published") -> WeightMap:
    return WeightMap(read_architecture(write_tiny_config(family, folder)), form)


def fill(cells: np.ndarray, offset: tuple[int, ...], size: tuple[int, ...]) -> None:
    cells[tuple(slice(low, low + length) for low, length in zip(offset, size, strict=True))] += 1


def test_every_family_has_a_variant_here() -> None:
    assert {str(variant["model_type"]) for variant in TINY.values()} == set(TABLES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", TINY)
def test_pieces_fill_both_sides_exactly_once(family: str, form: Form, tmp_path: Path) -> None:
    """Every number of every HF tensor has one place in Megatron, and every number there one origin, but for padding."""
    weight_map = map_of(family, tmp_path, form)
    hf = {name: np.zeros(entry.shape, np.uint8) for name, entry in weight_map.hf.items()}
    for name, rule in weight_map.rules.items():
        cells = np.zeros(rule.shape, np.uint8)
        for piece in weight_map.pieces(name):
            assert math.prod(piece.box[1]) == math.prod(piece.hf_box[1])
            assert [n for n in piece.box[1] if n > 1] == [n for n in piece.hf_box[1] if n > 1]
            fill(cells, *piece.box)
            fill(hf[piece.hf], *piece.hf_box)
        real = rule.rows if rule.experts is None else rule.shape[0]
        assert (cells[:real] == 1).all() and (cells[real:] == 0).all(), name
    assert all((cells == 1).all() for cells in hf.values())
    parts = Counter((part.megatron, part.box, name, part.hf_box) for name in hf for part in weight_map.parts(name))
    pieces = Counter(
        (name, piece.box, piece.hf, piece.hf_box) for name in weight_map.rules for piece in weight_map.pieces(name)
    )
    assert parts == pieces


@pytest.mark.parametrize("family", TINY)
def test_hf_names_and_shapes_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    config = dict(TINY[family])
    if config["model_type"] == "kimi_k2":  # the authors' code, which is DeepSeek-V3's, is not part of transformers
        config["model_type"] = "deepseek_v3"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    stacked = map_of(family, tmp_path, "stacked")
    assert {name: entry.shape for name, entry in stacked.hf.items()} == theirs
    assert form_of(theirs) == ("stacked" if stacked.architecture.is_moe else "published")


@pytest.mark.parametrize("family", TINY)
def test_megatron_names_shapes_and_slices_are_those_of_the_built_model(family: str, tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path, family)) as policy:
        built = Counter(
            (piece.name, piece.shape, piece.offset, piece.size) for piece in model_slices(policy.model, policy.layout)
        )
    cells: dict[str, np.ndarray] = {}
    weight_map = map_of(family, tmp_path)
    for name, shape, offset, size in built:
        fill(cells.setdefault(name, np.zeros(shape, np.uint8)), offset, size)
    assert {name: values.shape for name, values in cells.items()} == {n: rule.shape for n, rule in weight_map.rules.items()}
    assert all((values == 1).all() for values in cells.values())


LAYOUTS = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from([1, 2]),
        "pipeline": st.sampled_from([1, 2]),
        "virtual_pipeline": st.sampled_from([1, 2]),
        "expert": st.sampled_from([1, 2, 4]),
        "expert_tensor": st.sampled_from([1, 2]),
        "context": st.sampled_from([1, 2]),
    }
)


@settings(deadline=None, max_examples=40)
@given(family=st.sampled_from(sorted(TINY)), sizes=LAYOUTS, copies=st.sampled_from([1, 2]))
def test_keepers_hold_every_number_once_under_any_layout(
    tmp_path_factory: pytest.TempPathFactory, family: str, sizes: dict[str, int], copies: int
) -> None:
    weight_map = map_of(family, tmp_path_factory.mktemp("any"))
    layout = LayoutSettings(**sizes)
    cells = {name: np.zeros(rule.shape, np.uint8) for name, rule in weight_map.rules.items()}
    for place in rank_coordinates(layout, smallest_world_size(layout) * copies):
        for held in weight_map.held(layout, place):
            if held.keeper:
                fill(cells[held.rule.megatron], *held.box)
    assert all((values == 1).all() for values in cells.values())


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_box_s_pieces_are_the_whole_s_pieces_inside_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Following random numbers of a random box to HF and back finds them where the whole tensor has them."""
    weight_map = map_of(data.draw(st.sampled_from(sorted(TINY))), tmp_path_factory.mktemp("box"))
    rule = weight_map.rules[data.draw(st.sampled_from(sorted(weight_map.rules)))]
    offset = tuple(data.draw(st.integers(0, length - 1)) for length in rule.shape)
    size = tuple(data.draw(st.integers(1, length - low)) for low, length in zip(offset, rule.shape, strict=True))

    def origins(box: tuple[tuple[int, ...], tuple[int, ...]] | None) -> np.ndarray:
        """For every number of the tensor, a number that tells its place in HF; 0 where there is none."""
        start = {name: 1 + i * 10**6 for i, name in enumerate(weight_map.hf)}
        found = np.zeros(rule.shape, np.int64)
        for piece in rule.pieces(box):
            shape = weight_map.hf[piece.hf].shape
            places = np.arange(start[piece.hf], start[piece.hf] + math.prod(shape)).reshape(shape)
            index = tuple(slice(low, low + n) for low, n in zip(*piece.hf_box, strict=True))
            window = tuple(slice(low, low + n) for low, n in zip(*piece.box, strict=True))
            found[window] = places[index].reshape(piece.box[1])
        return found

    window = tuple(slice(low, low + length) for low, length in zip(offset, size, strict=True))
    assert (origins((offset, size))[window] == origins(None)[window]).all()
    outside = origins((offset, size))
    outside[window] = 0
    assert not outside.any()


def test_extra_tensors_are_known_by_name(tmp_path: Path) -> None:
    weight_map = map_of("deepseek_v3", tmp_path)
    behind = {f"model.layers.4.{name}.weight" for name in ("eh_proj", "input_layernorm")}
    assert all(weight_map.is_extra(name, behind) for name in behind)  # the multi-token prediction layer behind four layers
    assert not weight_map.is_extra("model.layers.4.input_layernorm.weight", {"model.layers.4.input_layernorm.weight"})
    assert weight_map.is_extra("model.layers.0.self_attn.rotary_emb.inv_freq", behind)
    assert not weight_map.is_extra("model.layers.3.self_attn.q_proj.weight", behind)
    assert not weight_map.is_extra("lm_head.weight", behind)
    (tmp_path / "tied").mkdir()
    assert map_of("qwen2", tmp_path / "tied").is_extra("lm_head.weight", behind)

"""Which weights are FP8: one list for export, publishing and simulation, and the audit that holds them to it.

The form is DeepSeek-V3's: e4m3 numbers, one float32 scale for each 128 × 128 block under the weight's name with `_scale_inv`
behind it. What is quantised is every linear layer of the decoder, as in DeepSeek-V3's and Qwen3's own FP8 checkpoints;
embeddings, the output layer, norms, routers and biases are not. SGLang builds its layers from config.json before it sees a
tensor, so what config.json says and what the files hold must be the same list.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from megatron_rl.config.errors import CheckpointError
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.quantize import WEIGHT_BLOCKS, quantize
from megatron_rl.weights.rules import Rule, Shape

BLOCKS = WEIGHT_BLOCKS["blockwise"]
BLOCK = 128  # rows and columns
_LINEAR = re.compile(r"model\.decoder\.layers\.(\d+)\.(.*\.linear_\w+)\.weight")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


def scale_shape(shape: Shape) -> Shape:
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers and scales of a matrix, or of some rows of it that begin at a multiple of a block's."""
    return quantize(values, BLOCKS)


# -- the list ----------------------------------------------------------------------------------------------------------


def linear_tensors(weight_map: WeightMap, skip_first: int = 0, skip_last: int = 0) -> frozenset[str]:
    """The HF weights of all linear layers of the decoder, but for so many of its first and last layers."""
    return _hf_names(weight_map, _linear_rules(weight_map, skip_first, skip_last))


def fp8_tensors(weight_map: WeightMap, skip_first: int = 0, skip_last: int = 0) -> frozenset[str]:
    """The HF weights that a checkpoint holds in FP8: those of `linear_tensors` that SGLang can load so.

    It lays some tensors behind one another into one, scales too, which must then be cut at a block's edge; and what it
    computes in one operation has one format. Narrow layers that do not fit stay as they are, and config.json lists them.
    """
    rules = _linear_rules(weight_map, skip_first, skip_last)
    unfit = {_together(rule) for rule in rules if not _fits(rule)}
    return _hf_names(weight_map, [rule for rule in rules if _together(rule) not in unfit])


def _linear_rules(weight_map: WeightMap, skip_first: int, skip_last: int) -> list[Rule]:
    layers = range(skip_first, weight_map.architecture.layers - skip_last)
    matches = ((rule, _LINEAR.fullmatch(rule.megatron)) for rule in weight_map.rules.values())
    return [rule for rule, match in matches if match is not None and int(match[1]) in layers]


def _hf_names(weight_map: WeightMap, rules: Iterable[Rule]) -> frozenset[str]:
    megatron = {rule.megatron for rule in rules}
    return frozenset(name for name, entry in weight_map.hf.items() if entry.rule.megatron in megatron)


def _together(rule: Rule) -> str:
    """What has one format: all experts of a layer, shared ones too, which SGLang may fuse; the two latent down projections."""
    match = _LINEAR.fullmatch(rule.megatron)
    assert match is not None
    for sign, group in (("experts.", "experts"), ("_down_proj", "latent")):
        if sign in match[2] + ".":
            return f"{match[1]}.{group}"
    return rule.megatron


def _fits(rule: Rule) -> bool:
    """sglang 0.5.17, srt/layers/quantization/fp8.py: validate_block_quant_shapes (merged columns), create_fp8_moe_weight_;
    srt/models/deepseek_common/deepseek_weight_loader.py: queries' and keys' down projections are laid together."""
    merged = len(rule.parts) > 1 or rule.megatron.endswith(".linear_q_down_proj.weight")
    return not merged or all(part.shape[0] % BLOCK == 0 for part in rule.parts)


# -- config.json -------------------------------------------------------------------------------------------------------


def quantization_config(weight_map: WeightMap, quantized: Collection[str]) -> dict[str, Any]:
    """What config.json says of a checkpoint whose tensors of these names are FP8."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": _left_out(weight_map, quantized),
    }


def _left_out(weight_map: WeightMap, quantized: Collection[str]) -> list[str]:
    """Linear layers that stay as they are, the output layer and routers among them, as Qwen3's FP8 checkpoints list them."""
    names: dict[str, None] = {}
    for name, entry in weight_map.hf.items():
        if len(entry.shape) == 2 and name not in quantized and entry.rule not in weight_map.first:
            expert = _EXPERT.fullmatch(name)
            names[expert[1] if expert else name.removesuffix(".weight")] = None
    return list(names)


def served_tensors(weight_map: WeightMap, quantization: Mapping[str, Any] | None) -> frozenset[str]:
    """The HF weights that SGLang expects in FP8 after reading a config.json's `quantization_config`.

    sglang 0.5.17, srt/layers/quantization/fp8.py (Fp8Config.get_quant_method) and utils.py (is_layer_skipped): every linear
    layer and every layer's experts, unless the path of the module is, or lies below, a name of the list.
    """
    if quantization is None:
        return frozenset()
    listed = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
    ignored = [str(name).removeprefix("model.").rstrip(".") for name in listed]

    def skipped(name: str) -> bool:
        path = f".{name.removesuffix('.weight').removeprefix('model.')}."
        return any(f".{each}." in path for each in ignored)

    return frozenset(name for name in linear_tensors(weight_map) if not skipped(name))


# -- the audit ---------------------------------------------------------------------------------------------------------


def audit(sides: Mapping[str, Collection[str]]) -> None:
    """Every side must hold the same weights quantised; a difference is an error that names both sides and the weights."""
    (first, expected), *others = sides.items()
    for other, found in others:
        for more, less, names in ((first, other, set(expected) - set(found)), (other, first, set(found) - set(expected))):
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
                raise CheckpointError(
                    f"{len(names)} weights are FP8 in {more} and not in {less}: {shown}. Both sides must quantise the same "
                    "layers: precision.fp8_skip_first_layers and fp8_skip_last_layers, and modules_to_not_convert in "
                    "config.json, say which."
                )

"""Which layers are FP8 where trainer and servers both compute, with which scales: one list each, held against one another.

Three sides round weights: the trainer in its products (`precision:`), servers as their config.json says
(`quantization_config`), and our FP8 export, where there is one, from which servers may be started. Two that round, and do not
round the same layers by the same blocks, are two models; that is an error which names the modules. Where only one side rounds,
that is a choice (FP8 rollouts of a policy that trains in bfloat16): it widens the mismatch, and is said.

The router, embeddings, norms and the output layer are FP8 on no side.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import PrecisionSettings
from megatron_rl.config.show import spans
from megatron_rl.weights.fp8 import BLOCKS, fp8_tensors, linear_tensors, served_tensors
from megatron_rl.weights.map import WeightMap
from megatron_rl.weights.quantize import ACTIVATION_BLOCKS, WEIGHT_BLOCKS, Blocks

TRAINER, SERVERS, EXPORT = "the trainer", "the servers", "our FP8 export"
WHOLE, ROWS = Blocks(None, None), Blocks(1, None)
# By which Transformer Engine is told to leave the scales of its blocks as they are. Without it they are powers of two.
ANY_SCALE = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
SHOWN = 6  # modules that a message names
_LAYER = re.compile(r"(?<=model\.layers\.)(\d+)(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Rounding:
    """The blocks that share a scale, of a weight and of what it multiplies."""

    weights: Blocks
    activations: Blocks

    def __str__(self) -> str:
        return f"weights {_said(self.weights)}, activations {_said(self.activations)}"


Side = Mapping[str, Rounding]  # by the HF name of each weight that is FP8


@dataclass(frozen=True)
class LayerAudit:
    """What each side rounds. `problems` are errors; `remarks` say what makes a difference and may be meant so."""

    sides: Mapping[str, Side]
    problems: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def require(self) -> None:
        if self.problems:
            raise SettingsError("\n".join(self.problems))

    def summary(self) -> dict[str, dict[str, str]]:
        """For each side its FP8 modules, layers and experts of a kind together, and how they are rounded."""
        return {
            name: {kind: f"layers {layers}: {side[example]}" for kind, (layers, example) in modules(side).items()}
            for name, side in self.sides.items()
        }


def audit_layers(
    weight_map: WeightMap, precision: PrecisionSettings, served: Side, *, exports: bool = False, any_scale: bool | None = None
) -> LayerAudit:
    """The trainer of these settings against servers that round so (`served_layers`), and against what it `exports` in FP8.

    `any_scale`: whether Transformer Engine was told of its variable; default: as it stands in the environment.
    """
    sides = {TRAINER: trained_layers(weight_map, precision), SERVERS: served}
    if exports:
        sides[EXPORT] = exported_layers(weight_map, precision)
    trained, others = sides[TRAINER], [name for name in sides if name != TRAINER and sides[name] and sides[TRAINER]]
    problems = [line for name in others for line in differences(TRAINER, trained, name, sides[name])]
    remarks = []
    if trained and not served:
        remarks.append(f"{TRAINER} computes in FP8 and {SERVERS} do not")
    if served and not trained:
        remarks.append(f"{SERVERS} compute in FP8 and {TRAINER} does not")
    told = os.environ.get(ANY_SCALE) == "1" if any_scale is None else any_scale
    if trained and served and precision.fp8 == "transformer_engine" and precision.fp8_recipe == "blockwise" and not told:
        remarks.append(
            "Transformer Engine rounds the scales of its blocks up to powers of two, and servers do not, Blackwell's apart: on "
            f"Hopper start the trainer with {ANY_SCALE}=1"
        )
    return LayerAudit(sides, tuple(problems), tuple(remarks))


def trained_layers(weight_map: WeightMap, precision: PrecisionSettings) -> Side:
    """What the trainer's products round, by Transformer Engine or simulated."""
    if precision.fp8 == "off":
        return {}
    recipe = "tensorwise" if precision.fp8_recipe == "delayed" else precision.fp8_recipe  # which takes its scales from the past
    rounding = Rounding(WEIGHT_BLOCKS[recipe], ACTIVATION_BLOCKS[recipe])
    return dict.fromkeys(linear_tensors(weight_map, precision.fp8_skip_first_layers, precision.fp8_skip_last_layers), rounding)


def exported_layers(weight_map: WeightMap, precision: PrecisionSettings) -> Side:
    """What `checkpoint.export_dtype=fp8` writes of a trainer of these settings, as servers will read it."""
    skip = (precision.fp8_skip_first_layers, precision.fp8_skip_last_layers) if precision.fp8 != "off" else (0, 0)
    return dict.fromkeys(fp8_tensors(weight_map, *skip), Rounding(BLOCKS, ACTIVATION_BLOCKS["blockwise"]))


def served_layers(weight_map: WeightMap, quantization: Mapping[str, Any] | None, online: str | None = None) -> Side:
    """What SGLang rounds after reading a config.json's `quantization_config`; `online`: its argument --quantization.

    Without blocks, as sglang 0.5.17 does on NVIDIA's GPUs (srt/layers/quantization/fp8.py, fp8_utils.py: apply_fp8_linear): a
    dense layer takes a scale a token and, of weights that it rounds itself, a scale a row; experts take one a tensor.
    """
    method = quantization.get("quant_method") if quantization is not None else online
    if method is None:
        return {}
    if method != "fp8":
        source = "quantization_config is of method" if quantization is not None else "argument --quantization is"
        raise SettingsError(
            f"the servers' {source} {method!r}: what it rounds is not known here. Known is 'fp8', block-scaled or not."
        )
    given: Mapping[str, Any] = quantization or {}
    names = served_tensors(weight_map, given) if quantization is not None else linear_tensors(weight_map)
    dynamic, block = given.get("activation_scheme", "dynamic") == "dynamic", given.get("weight_block_size")
    if block:
        return dict.fromkeys(
            names, Rounding(Blocks(int(block[0]), int(block[1])), Blocks(1, int(block[1])) if dynamic else WHOLE)
        )
    dense = Rounding(WHOLE if quantization is not None else ROWS, ROWS if dynamic else WHOLE)
    return {name: Rounding(WHOLE, WHOLE) if _EXPERT.search(name) else dense for name in names}


def differences(first: str, ours: Side, second: str, theirs: Side) -> list[str]:
    """One line for what each side alone rounds, and one for what both do by other blocks."""
    found = []
    for more, less, names in ((first, second, ours.keys() - theirs.keys()), (second, first, theirs.keys() - ours.keys())):
        if names:
            found.append(
                f"{len(names)} weights are FP8 in {more} and not in {less}: {_named(names)}. Make the lists equal: "
                "precision.fp8_skip_first_layers and fp8_skip_last_layers on the one side, modules_to_not_convert in the "
                "quantization_config of config.json on the other."
            )
    other = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if other:
        found.append(
            f"{len(other)} weights are FP8 in both {first} and {second}, by other scales: {_named(other)}: "
            f"{ours[other[0]]} here, {theirs[other[0]]} there. Serve a checkpoint with weight_block_size [128, 128], and set "
            "precision.fp8_recipe=blockwise: without blocks servers take scales that no trainer's recipe does."
        )
    return found


def modules(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Modules of a kind, `model.layers.*.mlp.experts.*.up_proj`: the layers that have them so, and one of the weights."""
    kinds: dict[str, tuple[set[int], str]] = {}
    for name in sorted(names):
        layer = _LAYER.search(name)
        kind = _EXPERT.sub("*", _LAYER.sub("*", name)).removesuffix(".weight")
        layers, _ = kinds.setdefault(kind, (set(), name))
        layers |= {int(layer[1])} if layer else set()
    return {kind: (",".join(spans(layers)), example) for kind, (layers, example) in kinds.items()}


def _named(names: Iterable[str]) -> str:
    kinds = modules(names)
    shown = [f"{kind.replace('.layers.*.', f'.layers.{{{layers}}}.')}" for kind, (layers, _) in kinds.items()]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more kinds" if len(shown) > SHOWN else "")


def _said(blocks: Blocks) -> str:
    if blocks.columns is None:
        return "one scale a tensor" if blocks.rows is None else "one scale a row"
    return f"{blocks.rows} x {blocks.columns}" + (", scales powers of two" if blocks.power_of_two else "")

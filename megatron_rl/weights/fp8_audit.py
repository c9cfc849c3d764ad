"""Which layers are FP8 where trainer and servers both compute, with which scales: one list each, held against one another.

Three sides round weights: the trainer in its products (`precision:`), servers as their config.json says
(`quantization_config`), and our export, from which servers may be started. Two that round, and do not round the same layers by
the same blocks, are two models; that is an error which names the modules. Where only one side rounds, that is a choice (FP8
rollouts of a policy that trains in bfloat16): it widens the mismatch, and is said.

The router, embeddings, norms and the output layer are FP8 on no side.
"""

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
WHOLE = Blocks(None, None)
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
    """What each side rounds. `problems` are errors; `one_sided` says that the trainer rounds and servers do not, or so."""

    sides: Mapping[str, Side]
    problems: tuple[str, ...]
    one_sided: str | None = None

    def require(self) -> None:
        if self.problems:
            raise SettingsError("\n".join(self.problems))

    def summary(self) -> dict[str, dict[str, str]]:
        """For each side its FP8 modules, layers and experts of a kind together, and how they are rounded."""
        return {
            name: {kind: f"layers {layers}: {side[example]}" for kind, (layers, example) in modules(side).items()}
            for name, side in self.sides.items()
        }


def audit_layers(weight_map: WeightMap, precision: PrecisionSettings, served: Side) -> LayerAudit:
    """The trainer of these settings against servers that round so (`served_layers`), and against what it would export."""
    trained = trained_layers(weight_map, precision)
    if not trained or not served:
        alone = TRAINER if trained else SERVERS
        other = SERVERS if trained else TRAINER
        said = (
            f"{alone} compute{'s' if trained else ''} in FP8 and {other} {'do' if trained else 'does'} not"
            if trained or served
            else None
        )
        return LayerAudit({TRAINER: trained, SERVERS: served}, (), said)
    exported = exported_layers(weight_map, precision)
    problems = [*differences(TRAINER, trained, SERVERS, served), *differences(TRAINER, trained, EXPORT, exported)]
    return LayerAudit({TRAINER: trained, SERVERS: served, EXPORT: exported}, tuple(problems))


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
    """What SGLang rounds after reading a config.json's `quantization_config`; `online`: its argument --quantization."""
    if quantization is None:
        return dict.fromkeys(linear_tensors(weight_map), Rounding(WHOLE, WHOLE)) if online == "fp8" else {}
    if quantization.get("quant_method") != "fp8":
        raise SettingsError(
            f"the servers' quantization_config is of method {quantization.get('quant_method')!r}: what it rounds is not known "
            "here. Known is 'fp8', block-scaled or a scale a tensor."
        )
    block = quantization.get("weight_block_size")
    dynamic = quantization.get("activation_scheme", "dynamic") == "dynamic"
    weights = Blocks(int(block[0]), int(block[1])) if block else WHOLE
    activations = Blocks(1, int(block[1])) if block and dynamic else WHOLE
    return dict.fromkeys(served_tensors(weight_map, quantization), Rounding(weights, activations))


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
            f"{ours[other[0]]} here, {theirs[other[0]]} there. Set precision.fp8_recipe to what servers use (blockwise for "
            "weight_block_size [128, 128]), or serve a checkpoint of the same recipe."
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
    if blocks.rows is None or blocks.columns is None:
        return "one scale a tensor"
    return f"{blocks.rows} x {blocks.columns}" + (", scales powers of two" if blocks.power_of_two else "")

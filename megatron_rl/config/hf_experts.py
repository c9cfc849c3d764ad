"""Mixtures of experts as config.json files describe them: how many, in which layers, and how tokens choose."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_rl.config.architecture import Experts
from megatron_rl.config.hf_config import HfConfig


@dataclass(frozen=True)
class ExpertFields:
    """A family's mixture of experts: the names of its fields, and what its code fixes."""

    count: tuple[str, ...]  # names of the number of experts, one meaning (transformers 5 renamed some)
    layers: Literal["all", "sparse_step", "after_dense"]  # which layers hold experts
    hidden: str = "moe_intermediate_size"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool | None = None  # are the chosen weights rescaled to sum to one; None: norm_topk_prob says
    normalize_default: bool = False  # norm_topk_prob when it is absent
    expert_bias: bool = False
    group_score: Literal["max", "top2_sum"] | None = None  # None: the family has no groups
    shared: bool = False  # n_shared_experts and routed_scaling_factor are read


def read_experts(config: HfConfig, fields: ExpertFields, layers: int) -> tuple[Experts | None, tuple[bool, ...]]:
    """The mixture of experts and the layers that hold one; a family with experts may still have a model without."""
    count: int = config.integer(config.name_of(*fields.count), minimum=0)
    pattern = _moe_layers(config, fields, layers) if count else (False,) * layers
    if not any(pattern):
        return None, pattern
    top_k = config.integer("num_experts_per_tok")
    if top_k > count:
        config.refuse("num_experts_per_tok", f"there are only {count} experts")
    normalize = config.flag("norm_topk_prob", fields.normalize_default) if fields.normalize is None else fields.normalize
    hidden = config.integer(fields.hidden)
    experts = Experts(
        count=count,
        top_k=top_k,
        hidden=hidden,
        scoring=fields.scoring,
        normalize_top_k=normalize,
        softmax_before_top_k=fields.scoring == "softmax" and not normalize,
        expert_bias=fields.expert_bias,
    )
    if fields.shared:
        config.require("n_shared_experts")
        shared_hidden = config.integer("n_shared_experts", 0, minimum=0) * hidden
        experts = replace(experts, scaling_factor=config.number("routed_scaling_factor"), shared_hidden=shared_hidden)
    _check_routing(config, experts)
    return _with_groups(config, fields, experts), pattern


def _moe_layers(config: HfConfig, fields: ExpertFields, layers: int) -> tuple[bool, ...]:
    if fields.layers == "sparse_step":
        step, dense = config.integer("decoder_sparse_step", 1), config.value("mlp_only_layers", [])
        if not isinstance(dense, list) or not all(isinstance(layer, int) and 0 <= layer < layers for layer in dense):
            config.refuse("mlp_only_layers", f"expected a list of layer numbers from 0 to {layers - 1}")
        return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    if fields.layers == "after_dense":
        first, step = config.integer("first_k_dense_replace", minimum=0), config.integer("moe_layer_freq", 1)
        return tuple(layer >= first and layer % step == 0 for layer in range(layers))
    return (True,) * layers


def _check_routing(config: HfConfig, experts: Experts) -> None:
    if experts.normalize_top_k and experts.top_k == 1:
        config.refuse("num_experts_per_tok", "a lone weight rescaled to one leaves the router no gradient; expected 2 or more")
    if experts.scoring == "sigmoid" and not experts.normalize_top_k:
        config.refuse("norm_topk_prob", "not supported, Megatron-core always rescales sigmoid weights; supported: true")


def _with_groups(config: HfConfig, fields: ExpertFields, experts: Experts) -> Experts:
    """Group-limited choice: experts are chosen from the `topk_group` of `n_group` groups that score highest."""
    if fields.group_score is None or (fields.group_score == "max" and config.value("topk_method", "greedy") == "greedy"):
        return experts
    groups: int = config.integer("n_group")
    if experts.count % groups:
        config.refuse("n_group", f"must divide the {experts.count} experts")
    size = experts.count // groups
    chosen: int = config.integer("topk_group")
    if chosen > groups or chosen * size < experts.top_k:
        config.refuse("topk_group", f"{experts.top_k} experts cannot be chosen from {chosen} of {groups} groups of {size}")
    if chosen == groups:
        return experts  # every group is chosen: no limit
    if fields.group_score == "top2_sum" and size < 2:
        config.refuse("n_group", "a group is scored by its two best experts, so it needs two")
    return replace(experts, groups=groups, top_k_groups=chosen, group_score=fields.group_score)

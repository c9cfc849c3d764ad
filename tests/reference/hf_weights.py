"""transformers' weights in Megatron's single-rank parameters and back, for tests.

Written independently of the package's own conversion, so that it can judge it. Both directions are linear maps of the same
numbers: the way back also carries gradients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rl.config.architecture import Architecture

Merge = Callable[[list[Tensor]], Tensor]
Split = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter made of some transformers parameters."""

    megatron: str
    hf: tuple[str, ...]
    merge: Merge = lambda parts: parts[0]
    split: Split = lambda whole: [whole]


def load_hf_state(chunk: GPTModel, state: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Write transformers' weights into a whole, unsharded GPTModel. Every parameter must be met exactly once."""
    targets = {name: tensor for name, tensor in chunk.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    with torch.no_grad():
        for rule in _rules(architecture):
            targets.pop(rule.megatron).copy_(rule.merge([_fetch(state, name) for name in rule.hf]))
    assert not targets, f"parameters without weights: {sorted(targets)}"


def export_gradients(chunk: GPTModel, architecture: Architecture) -> dict[str, Tensor]:
    """The gradients of a whole, unsharded GPTModel under transformers' names, experts stacked as transformers 5 does."""
    found: dict[str, Tensor] = {}
    gradients = {name: _gradient(parameter) for name, parameter in chunk.named_parameters()}
    for rule in _rules(architecture):
        if rule.megatron in gradients:  # choice biases have none
            found |= zip(rule.hf, rule.split(gradients[rule.megatron]), strict=True)
    return _stack_experts(found, architecture)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Where DistributedDataParallel collects it, or where autograd leaves it."""
    main = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if main is None else main
    assert gradient is not None
    return gradient


def _fetch(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor by name; `name[i]` is expert i of a stacked one."""
    if name.endswith("]"):
        stack, index = name[:-1].split("[")
        return state[stack][int(index)]
    return state[name]


def _stack_experts(found: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    stacked = {name: tensor for name, tensor in found.items() if not name.endswith("]")}
    for name in found:
        if name.endswith("[0]"):
            stack, count = name.removesuffix("[0]"), architecture.experts.count if architecture.experts else 0
            stacked[stack] = torch.stack([found[f"{stack}[{index}]"] for index in range(count)])
    return stacked


# -- the rules ---------------------------------------------------------------------------------------------------------


def _rules(architecture: Architecture) -> list[Rule]:
    vocab = architecture.vocab
    pad: Merge = lambda parts: torch.nn.functional.pad(parts[0], (0, 0, 0, -vocab % 128))  # noqa: E731
    crop: Split = lambda whole: [whole[:vocab]]  # noqa: E731
    rules = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), pad, crop),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    ]
    if not architecture.tied_embeddings:
        rules.append(Rule("output_layer.weight", ("lm_head.weight",), pad, crop))
    for layer, moe in enumerate(architecture.moe_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention = _latent_attention(architecture) if architecture.latent_attention else _attention(architecture)
        for rule in attention + (_experts(architecture) if moe else _dense()):
            rules.append(Rule(here + rule.megatron, tuple(there + name for name in rule.hf), rule.merge, rule.split))
    return rules


def _attention(architecture: Architecture) -> list[Rule]:
    """Megatron keeps query, key and value of one query group together: [group: its queries, its key, its value]."""
    groups, dim = architecture.kv_heads, architecture.head_dim
    queries = architecture.heads // groups

    def merge(parts: list[Tensor]) -> Tensor:
        by_group = [part.unflatten(0, (groups, -1)) for part in parts]  # [groups, heads of a group * dim, ...]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(whole: Tensor) -> list[Tensor]:
        by_group = whole.unflatten(0, (groups, -1)).split([queries * dim, dim, dim], dim=1)
        return [part.flatten(0, 1) for part in by_group]

    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    rules = [
        Rule("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in names), merge, split),
        Rule("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
        Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    ]
    if architecture.qkv_bias:
        rules.append(Rule("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in names), merge, split))
    if architecture.qk_norm != "none":
        rules.append(Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)))
        rules.append(Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)))
    return rules


def _latent_attention(architecture: Architecture) -> list[Rule]:
    """Same layouts on both sides, rotary pairs included: Megatron takes neighbours as pairs, as the weights have them."""
    assert architecture.latent_attention is not None
    rules = [
        Rule("input_layernorm.weight", ("input_layernorm.weight",)),
        Rule("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",)),
        Rule("self_attention.linear_kv_up_proj.layer_norm_weight", ("self_attn.kv_a_layernorm.weight",)),
        Rule("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",)),
        Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    ]
    if architecture.latent_attention.q_lora_rank is None:
        return [*rules, Rule("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",))]
    return [
        *rules,
        Rule("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",)),
        Rule("self_attention.linear_q_up_proj.layer_norm_weight", ("self_attn.q_a_layernorm.weight",)),
        Rule("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",)),
    ]


def _gated(megatron: str, hf: str) -> list[Rule]:
    """A gated feed-forward layer: gate above up in one matrix."""
    return [
        Rule(
            f"{megatron}.linear_fc1.weight",
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            torch.cat,
            lambda whole: list(whole.chunk(2)),
        ),
        Rule(f"{megatron}.linear_fc2.weight", (f"{hf}.down_proj.weight",)),
    ]


def _dense() -> list[Rule]:
    return [*_gated("mlp", "mlp"), Rule("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",))]


def _experts(architecture: Architecture) -> list[Rule]:
    experts = architecture.experts
    assert experts is not None
    rules = [
        Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
        Rule("mlp.router.weight", ("mlp.gate.weight",)),
    ]
    if experts.expert_bias:
        rules.append(Rule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)))
    if experts.shared_hidden:
        rules += _gated("mlp.shared_experts", "mlp.shared_experts")
    for index in range(experts.count):
        rules.append(Rule(f"mlp.experts.linear_fc1.weight{index}", (f"mlp.experts.gate_up_proj[{index}]",)))
        rules.append(Rule(f"mlp.experts.linear_fc2.weight{index}", (f"mlp.experts.down_proj[{index}]",)))
    return rules

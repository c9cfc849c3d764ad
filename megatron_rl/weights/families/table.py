"""What family tables are made of: the rules that model families share, each said once.

Names on the left are Megatron-core's, as its sharded state dict has them; names on the right are those of the published
checkpoints. {layer} and {expert} are filled in by the weight map.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.architecture import Architecture, Experts, LatentAttention
from megatron_rl.config.layout_map import padded_vocab
from megatron_rl.weights.rules import Cut, HfTensor, Interleaved, Padded, Rule

# How experts are written: a tensor an expert, as published, or all of a layer's in one, as transformers 5 holds them.
Form = Literal["published", "stacked"]

MEGATRON_LAYER = "model.decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Table:
    """A family's rules. `first` and `last` stand on the ends of the pipeline, the others in each layer of their kind."""

    first: tuple[Rule, ...]
    every_layer: tuple[Rule, ...]
    dense_layers: tuple[Rule, ...]
    moe_layers: tuple[Rule, ...]
    last: tuple[Rule, ...]


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls its mixture of experts, below a layer."""

    router: str = "mlp.gate"
    gate: str = "mlp.experts.{expert}.gate_proj"
    up: str = "mlp.experts.{expert}.up_proj"
    down: str = "mlp.experts.{expert}.down_proj"
    bias: str = "mlp.gate.e_score_correction_bias"
    shared: str = "mlp.shared_experts"


def in_layer(megatron: str, *parts: tuple[str, tuple[int, ...]], **options: object) -> Rule:
    """A rule of a layer: names are those below the layer."""
    tensors = tuple(HfTensor(HF_LAYER + name, shape) for name, shape in parts)
    return Rule(MEGATRON_LAYER + megatron, tensors, **options)  # type: ignore[arg-type]


def decoder(architecture: Architecture, form: Form, names: ExpertNames | None = None) -> Table:
    """A decoder in the names that nearly all families share."""
    attention = latent_attention if architecture.latent_attention else grouped_attention
    experts = architecture.experts
    return Table(
        first=(embedding(architecture),),
        every_layer=attention(architecture),
        dense_layers=dense(architecture),
        moe_layers=mixture(architecture, experts, form, names or ExpertNames()) if experts else (),
        last=output(architecture),
    )


# -- ends --------------------------------------------------------------------------------------------------------------


def embedding(architecture: Architecture) -> Rule:
    table = HfTensor("model.embed_tokens.weight", (architecture.vocab, architecture.hidden))
    padded = Padded(padded_vocab(architecture.vocab))
    return Rule("model.embedding.word_embeddings.weight", (table,), padded, cut="rows")


def output(architecture: Architecture) -> tuple[Rule, ...]:
    """The last norm, and the output layer where it is not the embedding itself."""
    norm = Rule("model.decoder.final_layernorm.weight", (HfTensor("model.norm.weight", (architecture.hidden,)),))
    if architecture.tied_embeddings:
        return (norm,)
    head = HfTensor("lm_head.weight", (architecture.vocab, architecture.hidden))
    return norm, Rule("model.output_layer.weight", (head,), Padded(padded_vocab(architecture.vocab)), cut="rows")


# -- attention ---------------------------------------------------------------------------------------------------------


def grouped_attention(architecture: Architecture) -> tuple[Rule, ...]:
    """Queries, keys and values in one matrix, query group by query group; the norm before it is fused into it."""
    hidden, dim = architecture.hidden, architecture.head_dim
    width, key_width = architecture.heads * dim, architecture.kv_heads * dim
    rows = (("self_attn.q_proj", width), ("self_attn.k_proj", key_width), ("self_attn.v_proj", key_width))
    by_group = Interleaved(architecture.kv_heads)
    matrix = [(f"{name}.weight", (size, hidden)) for name, size in rows]
    rules = [
        in_layer("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight", (hidden,))),
        in_layer("self_attention.linear_qkv.weight", *matrix, transform=by_group, cut="rows"),
        in_layer("self_attention.linear_proj.weight", ("self_attn.o_proj.weight", (hidden, width)), cut="columns"),
    ]
    if architecture.qkv_bias:
        bias = [(f"{name}.bias", (size,)) for name, size in rows]
        rules.append(in_layer("self_attention.linear_qkv.bias", *bias, transform=by_group, cut="rows"))
    if architecture.qk_norm != "none":
        full = architecture.qk_norm == "full"  # over all heads together, or over each
        query, key = (width, key_width) if full else (dim, dim)
        rules.append(in_layer("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", (query,))))
        rules.append(in_layer("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", (key,))))
    return tuple(rules)


def latent_attention(architecture: Architecture) -> tuple[Rule, ...]:
    """Multi-head latent attention. Its bottlenecks are whole on every tensor rank; rotary pairs lie alike on both sides."""
    assert architecture.latent_attention is not None
    latent, hidden, heads = architecture.latent_attention, architecture.hidden, architecture.heads
    rank = latent.kv_lora_rank
    up = heads * (latent.qk_head_dim + latent.v_head_dim)
    own, theirs = "self_attention.", "self_attn."
    return (
        in_layer("input_layernorm.weight", ("input_layernorm.weight", (hidden,))),
        *_latent_queries(architecture, latent),
        in_layer(
            own + "linear_kv_down_proj.weight",
            (theirs + "kv_a_proj_with_mqa.weight", (rank + latent.qk_rope_head_dim, hidden)),
        ),
        in_layer(own + "linear_kv_up_proj.layer_norm_weight", (theirs + "kv_a_layernorm.weight", (rank,))),
        in_layer(own + "linear_kv_up_proj.weight", (theirs + "kv_b_proj.weight", (up, rank)), cut="rows"),
        in_layer(own + "linear_proj.weight", (theirs + "o_proj.weight", (hidden, heads * latent.v_head_dim)), cut="columns"),
    )


def _latent_queries(architecture: Architecture, latent: LatentAttention) -> tuple[Rule, ...]:
    width = architecture.heads * (latent.qk_head_dim + latent.qk_rope_head_dim)
    own, theirs, rank = "self_attention.", "self_attn.", latent.q_lora_rank
    if rank is None:
        whole = (theirs + "q_proj.weight", (width, architecture.hidden))
        return (in_layer(own + "linear_q_proj.weight", whole, cut="rows"),)
    return (
        in_layer(own + "linear_q_down_proj.weight", (theirs + "q_a_proj.weight", (rank, architecture.hidden))),
        in_layer(own + "linear_q_up_proj.layer_norm_weight", (theirs + "q_a_layernorm.weight", (rank,))),
        in_layer(own + "linear_q_up_proj.weight", (theirs + "q_b_proj.weight", (width, rank)), cut="rows"),
    )


# -- feed-forward ------------------------------------------------------------------------------------------------------


def gated(megatron: str, names: tuple[str, str, str], hidden: int, width: int, experts: int | None = None) -> tuple[Rule, ...]:
    """A gated feed-forward layer, or one for each expert: the gate above the up projection in one matrix, and the down."""
    gate, up, down = names
    into, out = (width, hidden), (hidden, width)
    gate_over_up = ((f"{gate}.weight", into), (f"{up}.weight", into))
    rows: Cut = "gated_rows"
    return (
        in_layer(f"{megatron}.linear_fc1.weight", *gate_over_up, transform=Interleaved(), cut=rows, experts=experts),
        in_layer(f"{megatron}.linear_fc2.weight", (f"{down}.weight", out), cut="columns", experts=experts),
    )


def dense(architecture: Architecture) -> tuple[Rule, ...]:
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    norm = ("post_attention_layernorm.weight", (architecture.hidden,))
    rules = gated("mlp", names, architecture.hidden, architecture.ffn_hidden)
    return in_layer("mlp.linear_fc1.layer_norm_weight", norm), *rules


def mixture(architecture: Architecture, experts: Experts, form: Form, names: ExpertNames) -> tuple[Rule, ...]:
    """Router, experts, and what a family has beside them. Stacked forms have the same names in every family."""
    hidden = architecture.hidden
    router = names.router if form == "published" else "mlp.gate"
    rules = [
        in_layer("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight", (hidden,))),
        in_layer("mlp.router.weight", (f"{router}.weight", (experts.count, hidden))),
    ]
    if experts.expert_bias:
        rules.append(in_layer("mlp.router.expert_bias", (names.bias, (experts.count,)), float32=True))
    if form == "published":
        each = (names.gate, names.up, names.down)
        rules += gated("mlp.experts.experts", each, hidden, experts.hidden, experts=experts.count)
    else:
        rules += stacked_experts(hidden, experts)
    if experts.shared_hidden:
        shared = (f"{names.shared}.gate_proj", f"{names.shared}.up_proj", f"{names.shared}.down_proj")
        rules += gated("mlp.shared_experts", shared, hidden, experts.shared_hidden)
    return tuple(rules)


def stacked_experts(hidden: int, experts: Experts) -> tuple[Rule, ...]:
    """All experts of a layer in one tensor: the same numbers in the same order as Megatron's."""
    both, down = ("mlp.experts.gate_up_proj", (2 * experts.hidden, hidden)), ("mlp.experts.down_proj", (hidden, experts.hidden))
    rows: Cut = "gated_rows"
    return (
        in_layer("mlp.experts.experts.linear_fc1.weight", both, cut=rows, experts=experts.count),
        in_layer("mlp.experts.experts.linear_fc2.weight", down, cut="columns", experts=experts.count),
    )

"""How many parameters a model has, and how many of them each rank holds: exact, from the architecture alone.

Counted are trainable parameters. The expert bias is none: no gradient moves it.
"""

from dataclasses import dataclass, fields

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.layout_map import padded_vocab, stage_layers
from megatron_rl.config.settings import LayoutSettings


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by kind."""

    embedding: int = 0
    attention: int = 0
    dense: int = 0
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    norms: int = 0
    output: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(**{kind.name: getattr(self, kind.name) + getattr(other, kind.name) for kind in fields(self)})

    @property
    def total(self) -> int:
        return sum(getattr(self, kind.name) for kind in fields(self))


@dataclass(frozen=True)
class Shards:
    """How many ways things are cut; uncut by default."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1


WHOLE = Shards()


def model_parameters(architecture: Architecture) -> Parameters:
    """The whole model, without the padding of the vocabulary."""
    layers = range(architecture.layers)
    return chunk_parameters(architecture, layers, WHOLE, architecture.vocab, first=True, last=True)


def active_parameters(architecture: Architecture) -> int:
    """Parameters that one token meets: all but the experts not chosen for it."""
    whole = model_parameters(architecture)
    if architecture.experts is None:
        return whole.total
    return whole.total - whole.experts + whole.experts * architecture.experts.top_k // architecture.experts.count


def stage_parameters(layout: LayoutSettings, architecture: Architecture) -> list[Parameters]:
    """What one rank of each pipeline stage holds (all ranks of a stage hold equally many).

    The padding of the vocabulary is held and counted. The bottlenecks of latent attention are whole on every tensor rank, as
    Transformer Engine has them.
    """
    shards = Shards(layout.tensor, layout.expert, layout.expert_tensor)
    rows = padded_vocab(architecture.vocab) // layout.tensor
    stages = []
    for stage, chunks in enumerate(stage_layers(layout, architecture)):
        total = Parameters()
        for index, layers in enumerate(chunks):
            first = stage == 0 and index == 0
            last = stage == layout.pipeline - 1 and index == len(chunks) - 1
            total += chunk_parameters(architecture, layers, shards, rows, first=first, last=last)
        stages.append(total)
    return stages


def chunk_parameters(
    architecture: Architecture, layers: range, shards: Shards, rows: int, *, first: bool, last: bool
) -> Parameters:
    """A run of layers; with the embedding, of so many rows, on the first chunk of the model, and with the last norm and the
    output layer on the last.

    A tied output layer is the embedding itself where both are on one chunk, and a copy of it where they are not.
    """
    vocabulary = rows * architecture.hidden
    tied_here = architecture.tied_embeddings and first
    ends = Parameters(
        embedding=vocabulary if first else 0,
        norms=architecture.hidden if last else 0,
        output=vocabulary if last and not tied_here else 0,
    )
    return sum((layer_parameters(architecture, layer, shards) for layer in layers), start=ends)


def layer_parameters(architecture: Architecture, layer: int, shards: Shards = WHOLE) -> Parameters:
    """One decoder layer."""
    hidden = architecture.hidden
    latent = architecture.latent_attention is not None
    attention, attention_norms = (_latent_attention if latent else _attention)(architecture, shards.tensor)
    norms = 2 * hidden + attention_norms
    experts = architecture.experts
    if experts is None or not architecture.moe_layers[layer]:
        return Parameters(attention=attention, norms=norms, dense=3 * hidden * architecture.ffn_hidden // shards.tensor)
    return Parameters(
        attention=attention,
        norms=norms,
        router=experts.count * hidden,
        experts=experts.count // shards.expert * 3 * hidden * experts.hidden // shards.expert_tensor,
        shared_experts=3 * hidden * experts.shared_hidden // shards.tensor + (hidden if experts.shared_gate else 0),
    )


def _attention(architecture: Architecture, tensor: int) -> tuple[int, int]:
    """Projections with their biases, and norms of queries and keys."""
    width, key_width = architecture.heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim
    qkv_width = width + 2 * key_width
    projections = architecture.hidden * (qkv_width + width) + (qkv_width if architecture.qkv_bias else 0)
    norms = {"none": 0, "head": 2 * architecture.head_dim, "full": width + key_width}  # whole on every tensor rank
    return projections // tensor, norms[architecture.qk_norm]


def _latent_attention(architecture: Architecture, tensor: int) -> tuple[int, int]:
    """Down and up projections of queries, keys and values, the output; and the norms of the bottlenecks."""
    latent, hidden, heads = architecture.latent_attention, architecture.hidden, architecture.heads
    assert latent is not None
    query_width = heads * (latent.qk_head_dim + latent.qk_rope_head_dim)
    down = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim + (latent.q_lora_rank or 0))
    up = (latent.q_lora_rank or hidden) * query_width + latent.kv_lora_rank * heads * (latent.qk_head_dim + latent.v_head_dim)
    output = heads * latent.v_head_dim * hidden
    return down + (up + output) // tensor, latent.kv_lora_rank + (latent.q_lora_rank or 0)

"""The matrix products that a token meets, on one rank: what is multiplied by what in a layer's forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.config.architecture import Architecture, Experts


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, columns], done `count` times with other weights."""

    rows: float
    inner: float
    columns: float
    count: float = 1
    grouped: bool = False  # of experts

    @property
    def operations(self) -> float:
        return 2 * self.rows * self.inner * self.columns * self.count

    def bytes(self, of_weight: float, of_activation: float) -> float:
        """Read and written once each."""
        moved = self.rows * (self.inner + self.columns) * of_activation + self.inner * self.columns * of_weight
        return moved * self.count


@dataclass(frozen=True)
class Cut:
    """How a layer's products are cut on one rank. A server's are cut the same way, over tensor ranks alone."""

    tokens: float  # that products cut by heads or widths see
    local: float  # that see whole weights, such as routers and the bottlenecks of latent attention
    routed: float  # (token, expert) pairs that this rank's experts get
    tensor: int
    expert: int
    expert_tensor: int


def layer_products(architecture: Architecture, moe: bool, cut: Cut) -> list[Product]:
    """Of one decoder layer."""
    experts = architecture.experts
    attention = list(_attention(architecture, cut))
    if moe and experts is not None:
        return [*attention, *_mixture(architecture.hidden, experts, cut)]
    return [*attention, *_gated(cut.tokens, architecture.hidden, architecture.ffn_hidden / cut.tensor)]


def _attention(architecture: Architecture, cut: Cut) -> Iterator[Product]:
    hidden, heads, latent = architecture.hidden, architecture.heads / cut.tensor, architecture.latent_attention
    if latent is None:
        width = heads * architecture.head_dim
        keys = architecture.kv_heads / cut.tensor * architecture.head_dim
        yield Product(cut.tokens, hidden, width + 2 * keys)
        yield Product(cut.tokens, width, hidden)
        return
    query = heads * (latent.qk_head_dim + latent.qk_rope_head_dim)
    yield Product(cut.local, hidden, latent.kv_lora_rank + latent.qk_rope_head_dim + (latent.q_lora_rank or 0))
    yield Product(cut.tokens, latent.q_lora_rank or hidden, query)
    yield Product(cut.tokens, latent.kv_lora_rank, heads * (latent.qk_head_dim + latent.v_head_dim))
    yield Product(cut.tokens, heads * latent.v_head_dim, hidden)


def _mixture(hidden: int, experts: Experts, cut: Cut) -> Iterator[Product]:
    yield Product(cut.local, hidden, experts.count)
    held, width = experts.count / cut.expert, experts.hidden / cut.expert_tensor
    yield from _gated(cut.routed / held, hidden, width, count=held, grouped=True)
    if experts.shared_hidden:
        yield from _gated(cut.tokens, hidden, experts.shared_hidden / cut.tensor)


def _gated(rows: float, hidden: int, width: float, count: float = 1, grouped: bool = False) -> Iterator[Product]:
    """A gated feed-forward block: gate and up together, then down."""
    yield Product(rows, hidden, 2 * width, count, grouped)
    yield Product(rows, width, hidden, count, grouped)


def pair_operations(architecture: Architecture, tensor: int = 1) -> float:
    """Of one (query, key) pair in a layer: a product over the query-key width and one over the value width, in every head."""
    latent = architecture.latent_attention
    width = latent.qk_head_dim + latent.qk_rope_head_dim + latent.v_head_dim if latent else 2 * architecture.head_dim
    return 2 * architecture.heads / tensor * width


def key_value_width(architecture: Architecture, tensor: int = 1) -> float:
    """Numbers that attention keeps of a token in a layer, on a rank of a server: keys and values, or the latent of both.

    Key-value heads are dealt to tensor ranks, one at least to each; a latent is whole on all of them.
    """
    latent = architecture.latent_attention
    if latent is not None:
        return latent.kv_lora_rank + latent.qk_rope_head_dim
    return 2 * max(architecture.kv_heads / tensor, 1) * architecture.head_dim

"""Rules about how SGLang cuts the model over the GPUs of a server: what its code asserts while a server loads (read in 0.5.17).

Key-value heads fewer than GPUs are copied, where they divide evenly among them. A server on a CPU pads what does not divide, so
nothing is asked where device.kind says that there is no GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.rules.case import Case, Rule, either, problem
from megatron_rl.config.settings import Settings
from megatron_rl.config.sglang_arguments import value_of

PADDING = 64  # SGLang fills the vocabulary up to a multiple of it


@dataclass(frozen=True)
class Cut:
    """Sizes of a server as `sglang:` gives them."""

    tensor: int
    data: int  # attention's copies, each on as many GPUs
    expert: int
    context: int  # and parts of attention's sequences
    moves_tokens: bool  # to whole experts, which are then not cut in width
    shared_head: bool  # the output layer is cut over the GPUs of a copy of attention
    whole_dense: bool  # dense layers beside experts are not cut

    @classmethod
    def of(cls, settings: Settings) -> "Cut":
        def whole(name: str) -> int:
            value = value_of(settings.sglang, name)
            return value if isinstance(value, int) and value > 0 else 1

        return cls(
            tensor=whole("tp_size"),
            data=whole("dp_size") if value_of(settings.sglang, "enable_dp_attention") else 1,
            expert=whole("ep_size"),
            context=whole("attn_cp_size"),
            moves_tokens=value_of(settings.sglang, "moe_a2a_backend") not in (None, "none") or whole("moe_dp_size") > 1,
            shared_head=bool(value_of(settings.sglang, "enable_dp_lm_head")),
            whole_dense=value_of(settings.sglang, "moe_dense_tp_size") == 1,
        )

    @property
    def attention(self) -> int:
        """GPUs that heads are cut over."""
        return self.tensor // (self.data * self.context)

    @property
    def names(self) -> str:
        given = {"dp_size": self.data, "attn_cp_size": self.context, "ep_size": self.expert}
        others = [f"sglang.{name} = {size}" for name, size in given.items() if size > 1]
        return f"sglang.tp_size = {self.tensor}" + (f" with {' and '.join(others)}" if others else "")


def servers_can_cut_the_model(case: Case) -> Iterator[str]:
    if case.settings.device.kind == "cpu" or not case.settings.sglang:
        return
    cut, model = Cut.of(case.settings), case.architecture
    copies = cut.data * cut.context
    if cut.tensor % copies:
        yield problem(
            cut.names,
            "each copy of attention takes as many of a server's GPUs",
            f"Set sglang.tp_size to a multiple of {copies}",
        )
    elif not _experts_divide(model, cut):
        count = model.experts.count if model.experts else 0
        fitting = [size for size in range(1, cut.tensor + 1) if _experts_divide(model, replace(cut, expert=size))]
        yield problem(
            f"sglang.ep_size = {cut.expert} with sglang.tp_size = {cut.tensor}",
            f"SGLang deals the model's {count} experts evenly to ep_size groups of the server's {cut.tensor} GPUs",
            f"Set sglang.ep_size to {either(fitting)}",
        )
    elif uneven := list(_uneven(model, cut)):
        others = [replace(cut, tensor=size) for size in range(copies, copies * model.heads + 1, copies)]
        fitting = [other.tensor for other in others if _experts_divide(model, other) and not list(_uneven(model, other))]
        yield problem(
            cut.names,
            f"SGLang cuts a model into equal parts, and its {', its '.join(uneven)}",
            f"Set sglang.tp_size to {either(fitting)}" if fitting else "Leave these settings out",
        )


def _experts_divide(model: Architecture, cut: Cut) -> bool:
    if not model.is_moe or model.experts is None or cut.moves_tokens or cut.expert == 1:
        return True
    return cut.tensor % cut.expert == 0 and model.experts.count % cut.expert == 0


def _uneven(model: Architecture, cut: Cut) -> Iterator[str]:
    """What of the model cannot be cut into as many equal parts, in words that follow `its`."""
    heads, copied = cut.attention, model.kv_heads < cut.attention
    if model.heads % heads:
        yield f"{model.heads} attention heads do not divide by {heads}"
    elif model.latent_attention is None and (heads % model.kv_heads if copied else model.kv_heads % heads):
        yield f"{model.kv_heads} key-value heads neither divide by {heads} nor divide it"
    if (not model.is_moe or (not all(model.moe_layers) and not cut.whole_dense)) and model.ffn_hidden % cut.tensor:
        yield f"feed-forward width of {model.ffn_hidden:,} does not divide by {cut.tensor}"
    width = cut.tensor // cut.expert
    if model.is_moe and model.experts is not None and not cut.moves_tokens and model.experts.hidden % width:
        yield f"experts' width of {model.experts.hidden:,} does not divide by {width}"
    padded = -(-model.vocab // PADDING) * PADDING
    rows = heads if cut.data > 1 and (model.tied_embeddings or cut.shared_head) else cut.tensor
    if padded % rows:
        yield f"vocabulary of {padded:,} (with padding) does not divide by {rows}"


RULES: tuple[Rule, ...] = (servers_can_cut_the_model,)

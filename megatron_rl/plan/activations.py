"""What a layer keeps of a pack between its forward and its backward pass, on one rank.

Counted as the layers of `policy/specs.py` keep it with Transformer Engine, flash attention and no dropout: the input of every
product with weights, what norms, rotary embedding and activation functions need, the operands of attention and its output.
In the manner of Korthikanti et al. 2022 (arXiv 2205.05198), for the modules at hand.
"""

from megatron_rl.config.architecture import Architecture, LatentAttention
from megatron_rl.plan.job import Job


def layer_activations(job: Job, moe: bool) -> dict[str, float]:
    """Bytes by part, nothing recomputed."""
    architecture, layout, width = job.architecture, job.layout, job.bytes
    saved = 1 if job.fp8 else width  # of a number that is kept as the operand of a product
    hidden = architecture.hidden
    whole, local, tensor = job.context_tokens, job.local, layout.tensor
    parts = {"residual": 2 * local * hidden * width, "normed": 2 * local * hidden * saved}
    parts |= _attention(architecture, whole / tensor, local, width, saved)
    experts = architecture.experts
    if not moe or experts is None:
        parts["mlp"] = whole / tensor * architecture.ffn_hidden * (2 * width + saved)
        return parts
    routed = local * experts.top_k * layout.expert_tensor * job.machine.costs.imbalance  # tokens that reach this rank's experts
    shard = experts.hidden / layout.expert_tensor
    parts["router"] = local * experts.count * 3 * 4  # logits, scores and probabilities, float32
    parts["expert_input"] = routed * hidden * saved
    parts["expert_gate"] = routed * 2 * shard * width
    parts["expert_activation"] = routed * shard * saved
    parts["shared"] = whole / tensor * experts.shared_hidden * (2 * width + saved)
    return parts


def _attention(architecture: Architecture, sharded: float, local: float, width: int, saved: int) -> dict[str, float]:
    """`sharded`: tokens over tensor ranks, for what is cut by heads."""
    latent = architecture.latent_attention
    if latent is not None:
        return _latent(architecture.heads, latent, sharded, local, width, saved)
    queries, keys = architecture.heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim
    return {
        "queries": sharded * (queries + 2 * keys + queries + keys) * width,  # projected; queries and keys once more, rotated
        "attended": sharded * (queries * saved + architecture.heads * 4),  # and float32 normalisers
    }


def _latent(heads: int, latent: LatentAttention, sharded: float, local: float, width: int, saved: int) -> dict[str, float]:
    bottlenecks = (latent.q_lora_rank or 0) + latent.kv_lora_rank
    query = latent.qk_head_dim + latent.qk_rope_head_dim
    up = heads * (query + latent.qk_head_dim + latent.v_head_dim)  # as projected
    operands = heads * (2 * query + latent.v_head_dim)  # as attention takes them: with their rotated parts
    return {
        "bottlenecks": local * ((bottlenecks + latent.qk_rope_head_dim) * width + bottlenecks * saved),
        "queries": sharded * (up + operands) * width,
        "attended": sharded * (heads * latent.v_head_dim * saved + heads * 4),
    }


def kept_activations(job: Job, moe: bool) -> float:
    """Bytes that a layer keeps with the settings' recomputation, mode full apart."""
    parts = layer_activations(job, moe)
    recompute = job.settings.recompute
    if recompute.mode != "selective":
        return sum(parts.values())
    local, hidden = job.local, job.architecture.hidden
    norm = parts["normed"] / 2
    experts = ("router", "expert_input", "expert_gate", "expert_activation", "shared")
    for module in recompute.modules:
        match module:
            case "layernorm":  # norms that are modules of their own: before experts, and before latent attention
                parts["normed"] -= norm * (moe + (job.architecture.latent_attention is not None))
            case "moe_act":
                parts.pop("expert_activation", None)
            case "mla_up_proj":
                parts.pop("queries", None)
            case "shared_experts":
                parts.pop("shared", None)
            case "mlp" if not moe:
                parts["mlp"] = local * hidden * job.bytes
            case "moe" if moe:
                parts = {name: size for name, size in parts.items() if name not in experts}
            case _:  # core_attn: flash attention keeps its operands anyway
                pass
    return sum(parts.values())


def head_bytes(job: Job) -> float:
    """The head's working memory: a chunk of logits, the gathered hidden states, and float32 gradients of both operands."""
    architecture, tensor = job.architecture, job.layout.tensor
    rows, hidden = architecture.vocab / tensor, architecture.hidden
    chunk = min(job.settings.policy.log_prob_chunk, job.context_tokens)
    logits = chunk * rows * (4 + (job.bytes if job.bytes < 4 else 0))
    gradients = (job.context_tokens * hidden + rows * hidden) * (4 + (job.bytes if job.bytes < 4 else 0))
    return logits + job.context_tokens * hidden * job.bytes + gradients

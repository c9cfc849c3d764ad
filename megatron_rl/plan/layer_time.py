"""How long a rank works on one layer of one pack, forward and backward: products, attention, memory, collectives.

A product takes the longer of two: its operations at the reached share of the peak, or its bytes at that of memory's speed.
Nothing of one kind hides behind another but context parallelism's exchange behind attention. The backward pass takes each
product twice, and attention's core 2.5 times (Dao 2023, arXiv 2307.08691).
"""

from dataclasses import dataclass, fields

from megatron_rl.plan.job import Job
from megatron_rl.plan.products import Cut, Product, key_value_width, layer_products, pair_operations

ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Times:
    """Seconds by what they go to."""

    dense: float = 0.0  # products with dense weights
    experts: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # norms, activation functions, rotary embedding, permutation of tokens, casts
    tensor: float = 0.0  # collectives of tensor parallelism
    dispatch: float = 0.0  # tokens to experts and back
    context: float = 0.0  # keys and values between context ranks, as far as attention does not hide it
    host: float = 0.0  # launches and synchronisations that the device waits for

    def __add__(self, other: "Times") -> "Times":
        return Times(**{kind.name: getattr(self, kind.name) + getattr(other, kind.name) for kind in fields(self)})

    def __mul__(self, factor: float) -> "Times":
        return Times(**{kind.name: getattr(self, kind.name) * factor for kind in fields(self)})

    @property
    def total(self) -> float:
        return float(sum(getattr(self, kind.name) for kind in fields(self)))


def layer_forward(job: Job, moe: bool) -> Times:
    """Seconds of one layer's forward pass over a full pack."""
    products = layer_products(job.architecture, moe, _cut(job))
    attention = _attention_seconds(job)
    return Times(
        dense=sum(product_seconds(job, product) for product in products if not product.grouped),
        experts=sum(product_seconds(job, product) for product in products if product.grouped),
        attention=attention,
        memory=_memory_seconds(job, moe),
        tensor=_tensor_seconds(job, moe),
        dispatch=_dispatch_seconds(job) if moe else 0.0,
        context=max(0.0, _context_seconds(job) - attention),
        host=_host_seconds(job, moe),
    )


def layer_backward(job: Job, moe: bool) -> Times:
    """Of its backward pass, with what the settings have computed again."""
    forward = layer_forward(job, moe)
    attention = forward.attention * ATTENTION_BACKWARD
    # The inputs of what is cut by columns are gathered again for the weights' gradients.
    tensor = forward.tensor * (1.5 if job.layout.sequence_parallel_on else 1.0)
    exchanged = max(0.0, 2 * _context_seconds(job) - attention)
    back = Times(
        2 * forward.dense, 2 * forward.experts, attention, 2 * forward.memory, tensor, forward.dispatch, exchanged, forward.host
    )
    return back + recomputed(job, moe, forward)


def recomputed(job: Job, moe: bool, forward: Times) -> Times:
    """What is computed a second time: all of the layer, or the named modules' part of it. Mode full counts every layer."""
    recompute = job.settings.recompute
    if recompute.mode == "none":
        return Times()
    if recompute.mode == "full":
        return forward
    again = Times()
    for module in recompute.modules:
        match module:
            case "core_attn":
                again += Times(attention=forward.attention, context=forward.context)
            case "layernorm" | "moe_act":
                again += Times(memory=forward.memory / 8)
            case "mla_up_proj":
                up = layer_products(job.architecture, moe, _cut(job))[1:3]
                again += Times(dense=sum(product_seconds(job, product) for product in up))
            case "moe" if moe:
                again += Times(0.0, forward.experts, 0.0, forward.memory / 2, 0.0, forward.dispatch, 0.0, forward.host / 2)
            case "shared_experts" if moe:
                shared = [product for product in layer_products(job.architecture, moe, _cut(job)) if not product.grouped][-2:]
                again += Times(dense=sum(product_seconds(job, product) for product in shared))
            case "mlp" if not moe:
                mlp = layer_products(job.architecture, moe, _cut(job))[-2:]
                again += Times(dense=sum(product_seconds(job, product) for product in mlp))
            case _:  # a module that this layer has not
                pass
    return again


def head_seconds(job: Job) -> tuple[float, float]:
    """Forward and backward seconds of the output layer with the log-probabilities, of a full pack.

    Logits go through memory in float32 three times forward. Backward computes them again, then both gradients.
    """
    product = Product(job.context_tokens, job.architecture.hidden, job.architecture.vocab / job.layout.tensor)
    seconds = product_seconds(job, product, in_fp8=False)
    passes = 3 * job.context_tokens * product.columns * 4 / _memory_speed(job)
    gathered = _collective(job, job.context_tokens * job.architecture.hidden * job.bytes, job.layout.tensor, job.layout.tensor)
    return seconds + passes + gathered, 3 * seconds + 2 * passes + gathered


def product_seconds(job: Job, product: Product, *, in_fp8: bool | None = None) -> float:
    """The longer of operations and bytes."""
    machine, fp8 = job.machine, job.fp8 if in_fp8 is None else in_fp8
    peaks, shares = machine.tflops, machine.shares
    if fp8:
        assert peaks.fp8 is not None
        speed = peaks.fp8 * shares.matmul_fp8
    else:
        speed = (peaks.bfloat16 if job.bytes == 2 else peaks.float32) * shares.matmul
    if product.grouped:
        speed *= shares.grouped
    width = 1 if fp8 else job.bytes
    return max(product.operations / (speed * 1e12), product.bytes(width, job.bytes) / _memory_speed(job))


# -- parts of a layer --------------------------------------------------------------------------------------------------


def _cut(job: Job) -> Cut:
    experts, layout = job.architecture.experts, job.layout
    routed = job.local * (experts.top_k if experts else 0) * layout.expert_tensor * job.machine.costs.imbalance
    return Cut(job.context_tokens, job.local, routed, layout.tensor, layout.expert, layout.expert_tensor)


def _memory_speed(job: Job) -> float:
    return job.machine.memory_gb_s * 1e9 * job.machine.shares.memory


def _attention_seconds(job: Job) -> float:
    """Half of the (query, key) pairs of every sequence, a context rank's share of them. FP8 leaves this in bfloat16."""
    peak = job.machine.tflops.bfloat16 if job.bytes == 2 else job.machine.tflops.float32
    pairs = job.context_tokens * job.workload.attended / 2
    return pairs * pair_operations(job.architecture, job.layout.tensor) / (peak * 1e12 * job.machine.shares.attention)


def _memory_seconds(job: Job, moe: bool) -> float:
    """What is read and written beside products: two norms and two residual additions (ten passes over the hidden states),
    rotary embedding (two over queries and keys), the activation function (three over its width); for experts two permutations
    on either side and the weighted sum (six passes over routed tokens). FP8 casts each operand: 4 bytes a number."""
    architecture, layout, width = job.architecture, job.layout, job.bytes
    cut, experts = _cut(job), architecture.experts
    heads = (architecture.heads + architecture.kv_heads) * architecture.head_dim / layout.tensor
    moved = 10 * cut.local * architecture.hidden + 2 * cut.tokens * heads
    if moe and experts is not None:
        moved += cut.routed * (6 * architecture.hidden + 3 * experts.hidden / layout.expert_tensor)
        moved += 3 * cut.tokens * experts.shared_hidden / layout.tensor
    else:
        moved += 3 * cut.tokens * architecture.ffn_hidden / layout.tensor
    casts = sum(p.rows * p.inner * p.count for p in layer_products(architecture, moe, cut)) * 4 if job.fp8 else 0.0
    return (moved * width + casts) / _memory_speed(job)


def _collective(job: Job, bytes_whole: float, size: int, span: int) -> float:
    """An all-gather or reduce-scatter over `size` ranks that lie within `span` neighbours."""
    if size == 1:
        return 0.0
    speed, latency = job.machine.link(span)
    return bytes_whole * (size - 1) / size / speed + latency


def _tensor_seconds(job: Job, moe: bool) -> float:
    """Gather before and scatter after attention, and again around a dense or shared feed-forward block. Without sequence
    parallelism an all-reduce after each, which is as much."""
    layout, experts = job.layout, job.architecture.experts
    whole = job.context_tokens * job.architecture.hidden * job.bytes
    blocks = 1 + (not moe or (experts is not None and experts.shared_hidden > 0))
    return 2 * blocks * _collective(job, whole, layout.tensor, layout.tensor)


def _dispatch_seconds(job: Job) -> float:
    """Tokens to experts and back: an all-to-all each way over the expert ranks, and gather and scatter over those that share an
    expert. What goes to other domains goes at the same time as what stays. DeepEP (flex) sends a token once to each domain."""
    layout, experts = job.layout, job.architecture.experts
    assert experts is not None
    ranks, domain = layout.expert * layout.expert_tensor, job.machine.domain
    token = job.architecture.hidden * job.bytes
    routed = job.local * experts.top_k * token * job.machine.costs.imbalance
    shared = 2 * _collective(job, routed * layout.expert_tensor, layout.expert_tensor, layout.expert_tensor)
    if layout.expert == 1:
        return shared
    domains = max(1, ranks / domain)
    near = routed * (1 / domains - 1 / layout.expert)
    far = routed * (1 - 1 / domains)
    if job.settings.moe.dispatcher == "flex" and domains > 1:
        reached = domains * (1 - (1 - 1 / domains) ** experts.top_k)  # by a token's experts, chosen at random
        if experts.top_k_groups is not None and experts.groups is not None:
            reached = min(reached, domains * experts.top_k_groups / experts.groups)
        far = job.local * reached * (1 - 1 / domains) * token * job.machine.costs.imbalance
    inside, near_latency = job.machine.link(1)
    between, far_latency = job.machine.link(domain + 1)
    seconds = max(near / inside + near_latency, far / between + far_latency if domains > 1 else 0.0)
    return shared + 2 * seconds


def _context_seconds(job: Job) -> float:
    """Keys and values once around the ring of context ranks."""
    layout = job.layout
    if layout.context == 1:
        return 0.0
    architecture, latent = job.architecture, job.architecture.latent_attention
    width = (
        architecture.heads * (latent.qk_head_dim + latent.qk_rope_head_dim + latent.v_head_dim)
        if latent
        else key_value_width(architecture)
    )
    speed, latency = job.machine.link(layout.tensor * layout.context)
    return (layout.context - 1) * (job.context_tokens * width / layout.tensor * job.bytes / speed + latency)


def _host_seconds(job: Job, moe: bool) -> float:
    costs, experts = job.machine.costs, job.architecture.experts
    held = experts.count / job.layout.expert if moe and experts is not None else 0
    return (costs.layer_us + costs.expert_us * held) * 1e-6

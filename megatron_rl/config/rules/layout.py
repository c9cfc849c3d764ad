"""Rules about how the model is spread over ranks."""

from collections.abc import Iterator

from megatron_rl.config.layout_map import padded_vocab, smallest_world_size
from megatron_rl.config.rules.case import Case, Rule, counted, divisors, problem


def declared_world_size(case: Case) -> Iterator[str]:
    declared, cluster = case.layout.world_size, case.settings.cluster
    machines = f"cluster.nodes = {cluster.nodes}, cluster.gpus_per_node = {cluster.gpus_per_node}"
    if declared is not None and cluster.ranks is not None and declared != cluster.ranks:
        yield problem(
            f"layout.world_size = {declared}, {machines}",
            f"these machines take {cluster.ranks} ranks",
            "Remove layout.world_size, or make cluster.nodes fit",
        )
    elif declared is not None and declared != case.world_size:
        yield problem(
            f"layout.world_size = {declared}",
            f"the launcher started {counted(case.world_size, 'rank')}",
            f"Start {declared} ranks, or remove layout.world_size to take the launcher's number",
        )
    elif cluster.ranks is not None and cluster.ranks != case.world_size:
        yield problem(
            machines,
            f"the launcher started {counted(case.world_size, 'rank')}",
            f"Start {cluster.ranks} ranks, or set cluster to the machines that there are",
        )


def world_size_is_the_product(case: Case) -> Iterator[str]:
    layout = case.layout
    product = layout.tensor * layout.pipeline * layout.context
    if case.world_size % product:
        yield problem(
            f"layout.tensor = {layout.tensor}, layout.pipeline = {layout.pipeline}, layout.context = {layout.context}",
            f"one replica of the model takes their product, {product} ranks, and {case.world_size} ranks are no multiple of it",
            f"Start a multiple of {smallest_world_size(layout)} ranks, or make these sizes smaller",
        )


def experts_fill_a_stage(case: Case) -> Iterator[str]:
    layout = case.layout
    stage, spoilt = divmod(case.world_size, layout.pipeline)
    if case.experts and not spoilt and stage % (layout.expert * layout.expert_tensor):
        yield problem(
            f"layout.expert = {layout.expert}, layout.expert_tensor = {layout.expert_tensor}",
            f"the experts of a layer take their product, {layout.expert * layout.expert_tensor} ranks, and the {stage} ranks "
            "of a pipeline stage are no multiple of it",
            f"Choose layout.expert x layout.expert_tensor among {divisors(stage)}, or start a multiple of "
            f"{smallest_world_size(layout)} ranks",
        )


def experts_need_a_moe_model(case: Case) -> Iterator[str]:
    for name in ("expert", "expert_tensor"):
        size = getattr(case.layout, name)
        if size > 1 and case.experts is None:
            yield problem(f"layout.{name} = {size}", "the model has no experts to spread", f"Set layout.{name}=1")


def sequence_parallel_needs_tensor(case: Case) -> Iterator[str]:
    if case.layout.sequence_parallel and case.layout.tensor == 1:
        yield problem(
            "layout.sequence_parallel = true with layout.tensor = 1",
            "there are no tensor ranks to split the sequence between",
            "Remove layout.sequence_parallel (it is on by itself when layout.tensor > 1), or raise layout.tensor",
        )


def moe_needs_sequence_parallel(case: Case) -> Iterator[str]:
    if case.experts and case.layout.tensor > 1 and not case.layout.sequence_parallel_on:
        yield problem(
            f"layout.sequence_parallel = false with layout.tensor = {case.layout.tensor}",
            "Megatron trains a mixture of experts on several tensor ranks only with sequence parallelism",
            "Remove layout.sequence_parallel=false, or set layout.tensor=1",
        )


def tensor_divides_heads(case: Case) -> Iterator[str]:
    if case.architecture.heads % case.layout.tensor:
        yield problem(
            f"layout.tensor = {case.layout.tensor}",
            f"the model's {case.architecture.heads} attention heads do not divide over the tensor ranks",
            f"Set layout.tensor to {divisors(case.architecture.heads)}",
        )


def tensor_divides_kv_heads(case: Case) -> Iterator[str]:
    kv_heads = case.architecture.kv_heads
    if case.architecture.latent_attention is None and kv_heads % case.layout.tensor:
        yield problem(
            f"layout.tensor = {case.layout.tensor}",
            f"the model's {kv_heads} key-value heads do not divide over the tensor ranks; each needs at least one of its own",
            f"Set layout.tensor to {divisors(kv_heads)}; spread further with layout.pipeline or layout.context",
        )


def tensor_divides_feed_forward(case: Case) -> Iterator[str]:
    widths = {}
    if not all(case.architecture.moe_layers) or not case.experts:
        widths["dense feed-forward"] = case.architecture.ffn_hidden
    if case.experts:
        widths["shared-expert"] = case.experts.shared_hidden
    for kind, width in widths.items():
        if width % case.layout.tensor:
            yield problem(
                f"layout.tensor = {case.layout.tensor}",
                f"the {kind} width {width} does not divide over the tensor ranks",
                "Set layout.tensor to a smaller power of two",
            )


def tensor_divides_vocabulary(case: Case) -> Iterator[str]:
    rows = padded_vocab(case.architecture.vocab)
    if rows % case.layout.tensor:
        yield problem(
            f"layout.tensor = {case.layout.tensor}",
            f"the vocabulary of {case.architecture.vocab} tokens, padded to {rows} rows, does not divide over the tensor ranks",
            "Set layout.tensor to a power of two",
        )


def tensor_divides_latents(case: Case) -> Iterator[str]:
    latent = case.architecture.latent_attention
    if latent is None:
        return
    widths = {"query": latent.q_lora_rank or 0, "key-value": latent.kv_lora_rank + latent.qk_rope_head_dim}
    for kind, width in widths.items():
        if width % case.layout.tensor:
            yield problem(
                f"layout.tensor = {case.layout.tensor}",
                f"the {kind} bottleneck of the latent attention, {width} wide, does not divide over the tensor ranks",
                "Set layout.tensor to a smaller power of two",
            )


def expert_divides_experts(case: Case) -> Iterator[str]:
    if case.experts and case.experts.count % case.layout.expert:
        yield problem(
            f"layout.expert = {case.layout.expert}",
            f"the model's {case.experts.count} experts do not divide over the expert ranks",
            f"Set layout.expert to {divisors(case.experts.count)}",
        )


def expert_tensor_divides_expert_width(case: Case) -> Iterator[str]:
    if case.experts and case.experts.hidden % case.layout.expert_tensor:
        yield problem(
            f"layout.expert_tensor = {case.layout.expert_tensor}",
            f"the width of one expert, {case.experts.hidden}, does not divide over the ranks that share it",
            "Set layout.expert_tensor=1, or to a smaller power of two",
        )


def layers_divide_over_chunks(case: Case) -> Iterator[str]:
    layout, layers = case.layout, case.architecture.layers
    chunks = layout.pipeline * layout.virtual_pipeline
    if layout.pipeline_layers is None and layers % chunks:
        each, extra = divmod(layers, chunks)
        ends = chunks - extra  # the first and the last chunk also hold the vocabulary: longer chunks go between
        split = [each] * (ends // 2) + [each + 1] * extra + [each] * (ends - ends // 2)
        example = f"Say how many layers each chunk holds, such as layout.pipeline_layers=[{','.join(map(str, split))}]"
        yield problem(
            f"layout.pipeline = {layout.pipeline}, layout.virtual_pipeline = {layout.virtual_pipeline}",
            f"the model's {layers} layers do not divide over their product, {chunks} chunks",
            "Use fewer chunks" if 0 in split[1:-1] else example,
        )


def pipeline_layers_fit(case: Case) -> Iterator[str]:
    layout, layers = case.layout, case.architecture.layers
    if layout.pipeline_layers is None:
        return
    chunks, given = layout.pipeline * layout.virtual_pipeline, list(layout.pipeline_layers)
    if len(given) != chunks:
        yield problem(
            f"layout.pipeline_layers = {given}",
            f"these are {len(given)} numbers for layout.pipeline x layout.virtual_pipeline = {chunks} chunks",
            "Give one number for each chunk, in the order of the model",
        )
    elif sum(given) != layers:
        yield problem(
            f"layout.pipeline_layers = {given}",
            f"they add up to {sum(given)}, the model has {layers} layers",
            f"Make them add up to {layers}",
        )
    elif 0 in given[1:-1]:
        yield problem(
            f"layout.pipeline_layers = {given}",
            "a chunk between the first and the last would hold nothing at all",
            "Give each of these chunks a layer, or use fewer chunks (layout.pipeline, layout.virtual_pipeline)",
        )


def virtual_pipeline_needs_pipeline(case: Case) -> Iterator[str]:
    if case.layout.virtual_pipeline > 1 and case.layout.pipeline == 1:
        yield problem(
            f"layout.virtual_pipeline = {case.layout.virtual_pipeline} with layout.pipeline = 1",
            "the interleaved schedule needs stages to interleave",
            "Set layout.virtual_pipeline=1, or raise layout.pipeline",
        )


def parameter_gather_overlap(case: Case) -> Iterator[str]:
    layout = case.layout
    missing = [name for name in ("distributed_optimizer", "overlap_grad_reduce") if not getattr(layout, name)]
    if layout.overlap_param_gather and missing:
        yield problem(
            "layout.overlap_param_gather = true with " + " and ".join(f"layout.{name} = false" for name in missing),
            "weights are gathered during the forward pass only from the shards of a distributed optimizer whose gradients are "
            "reduced during the backward pass",
            "Set " + " and ".join(f"layout.{name}=true" for name in missing) + ", or layout.overlap_param_gather=false",
        )


RULES: tuple[Rule, ...] = (
    declared_world_size,
    world_size_is_the_product,
    experts_need_a_moe_model,
    experts_fill_a_stage,
    sequence_parallel_needs_tensor,
    moe_needs_sequence_parallel,
    tensor_divides_heads,
    tensor_divides_kv_heads,
    tensor_divides_feed_forward,
    tensor_divides_vocabulary,
    tensor_divides_latents,
    expert_divides_experts,
    expert_tensor_divides_expert_width,
    virtual_pipeline_needs_pipeline,
    layers_divide_over_chunks,
    pipeline_layers_fit,
    parameter_gather_overlap,
)

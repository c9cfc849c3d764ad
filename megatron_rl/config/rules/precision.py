"""Rules about number formats."""

from collections.abc import Iterator

from megatron_rl.config.rules.case import Case, Rule, problem

# Multiples that the sides of an FP8 matrix product must be. 16: FP8 tensor cores, also under blockwise scaling, whose last
# block may be short. 32: MXFP8 has no short blocks.
FP8_SIDES = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
BLOCK = 128  # blockwise scaling


def transformer_engine_needs_a_gpu(case: Case) -> Iterator[str]:
    if case.settings.precision.fp8 == "transformer_engine" and case.settings.device.kind == "cpu":
        yield problem(
            "precision.fp8 = transformer_engine with device.kind = cpu",
            "Transformer Engine runs on GPUs only",
            "Set precision.fp8=simulated to study FP8 on a CPU",
        )


def transformer_engine_needs_bfloat16(case: Case) -> Iterator[str]:
    precision = case.settings.precision
    if precision.fp8 == "transformer_engine" and precision.dtype != "bfloat16":
        yield problem(
            f"precision.fp8 = transformer_engine with precision.dtype = {precision.dtype}",
            "FP8 matrix products take and give bfloat16",
            "Set precision.dtype=bfloat16",
        )


def delayed_scaling_has_no_fixed_ratios(case: Case) -> Iterator[str]:
    """Transformer Engine moves the scales after each forward pass with gradients: log-probs of the same weights differ from
    micro-batch to micro-batch, and a ratio of new to old is not 1 before anything is learned."""
    precision = case.settings.precision
    if precision.fp8 != "off" and precision.fp8_recipe == "delayed":
        yield problem(
            f"precision.fp8 = {precision.fp8} with precision.fp8_recipe = delayed",
            "scales out of a history change between scoring and update, so importance ratios would be off from the start",
            "Set precision.fp8_recipe to tensorwise, blockwise or mxfp8",
        )


def old_log_probs_of_fp8(case: Case) -> Iterator[str]:
    """A warning: the one place where the rounding of FP8 gets into ratios."""
    precision, objective = case.settings.precision, case.settings.objective
    if precision.fp8 != "off" and objective.old_log_probs == "rollout" and not objective.on_policy:
        yield problem(
            f"objective.old_log_probs = rollout with precision.fp8 = {precision.fp8}",
            "importance ratios then hold the difference between the roundings of trainer and rollout engine, a mean log-ratio "
            "of up to 0.06 where one of them is in FP8: as wide as 200 clip windows of GSPO, which would clip at random",
            "Set objective.old_log_probs=recompute, and meet the mismatch with a weight (sequence_weight, geometric_mask)",
        )


def skipped_layers_leave_some(case: Case) -> Iterator[str]:
    precision, layers = case.settings.precision, case.architecture.layers
    if precision.fp8 != "off" and precision.fp8_skip_first_layers + precision.fp8_skip_last_layers >= layers:
        yield problem(
            f"precision.fp8_skip_first_layers = {precision.fp8_skip_first_layers}, "
            f"precision.fp8_skip_last_layers = {precision.fp8_skip_last_layers}",
            f"of the model's {layers} layers none is left to run in FP8",
            "Skip fewer, or set precision.fp8=off",
        )


def skipped_layers_stay_in_a_stage(case: Case) -> Iterator[str]:
    precision, most = case.settings.precision, case.architecture.layers // case.layout.pipeline
    for name in ("fp8_skip_first_layers", "fp8_skip_last_layers"):
        skipped = getattr(precision, name)
        if precision.fp8 == "transformer_engine" and most < skipped < case.architecture.layers:
            yield problem(
                f"precision.{name} = {skipped} with layout.pipeline = {case.layout.pipeline}",
                f"Megatron keeps at most one pipeline stage, {most} layers, out of FP8 at each end",
                f"Set precision.{name} to at most {most}",
            )


def fp8_sides_are_aligned(case: Case) -> Iterator[str]:
    precision, layout = case.settings.precision, case.layout
    if precision.fp8 == "off":
        return
    sides = FP8_SIDES[precision.fp8_recipe]
    for name, size, split in _matrix_sides(case):
        shard, odd = divmod(size, split)
        if odd:
            continue  # the layout rules say it
        # Blocks may not straddle shards: the results would depend on the layout. What sequence parallelism gathers over
        # tensor ranks must be whole blocks for Transformer Engine's Float8BlockQuantizer.
        whole_blocks = split > 1 or (name == "hidden" and layout.sequence_parallel_on)
        multiple = BLOCK if precision.fp8_recipe == "blockwise" and whole_blocks else sides
        if shard % multiple:
            yield problem(
                f"precision.fp8_recipe = {precision.fp8_recipe} with layout.tensor = {layout.tensor}, layout.expert_tensor = "
                f"{layout.expert_tensor}",
                f"the model's {name} width, {shard} on each rank, must be a multiple of {multiple} there",
                "Cut it less (layout.tensor, layout.expert_tensor), choose another precision.fp8_recipe, or precision.fp8=off",
            )


def _matrix_sides(case: Case) -> Iterator[tuple[str, int, int]]:
    """Name, size and number of shards of what decoder layers multiply by."""
    model, tensor = case.architecture, case.layout.tensor
    yield "hidden", model.hidden, 1
    if latent := model.latent_attention:
        yield "query bottleneck", latent.q_lora_rank or 0, 1
        yield "key-value bottleneck", latent.kv_lora_rank, 1
        yield "key-value down projection", latent.kv_lora_rank + latent.qk_rope_head_dim, 1
        yield "query", model.heads * (latent.qk_head_dim + latent.qk_rope_head_dim), tensor
        yield "key-value", model.heads * (latent.qk_head_dim + latent.v_head_dim), tensor
        yield "attention output", model.heads * latent.v_head_dim, tensor
    else:
        yield "query-key-value", (model.heads + 2 * model.kv_heads) * model.head_dim, tensor
        yield "attention output", model.heads * model.head_dim, tensor
    if not case.experts or not all(model.moe_layers):
        yield "feed-forward", model.ffn_hidden, tensor
    if case.experts:
        yield "expert", case.experts.hidden, case.layout.expert_tensor
        yield "shared-expert", case.experts.shared_hidden, tensor


RULES: tuple[Rule, ...] = (
    transformer_engine_needs_a_gpu,
    transformer_engine_needs_bfloat16,
    delayed_scaling_has_no_fixed_ratios,
    skipped_layers_leave_some,
    skipped_layers_stay_in_a_stage,
    fp8_sides_are_aligned,
)

WARNINGS: tuple[Rule, ...] = (old_log_probs_of_fp8,)

"""Rules about the mixture of experts."""

from collections.abc import Iterator

from megatron_rl.config.names import setting_fields
from megatron_rl.config.rules.case import Case, Rule, problem


def moe_settings_need_a_moe_model(case: Case) -> Iterator[str]:
    for name, value in case.settings.moe:
        default = setting_fields()[f"moe.{name}"].default
        if case.experts is None and value != default:
            yield problem(
                f"moe.{name} = {value}",
                "the model has no experts for it to act on",
                f"Remove it (default {default}), or train a MoE model",
            )


def bias_update_needs_a_bias(case: Case) -> Iterator[str]:
    rate = case.settings.moe.expert_bias_update_rate
    if rate and case.experts and not case.experts.expert_bias:
        yield problem(
            f"moe.expert_bias_update_rate = {rate}",
            f"the router of a {case.architecture.family} model has no expert bias",
            "Set moe.expert_bias_update_rate=0 and balance with moe.aux_loss_coefficient",
        )


def allgather_dispatcher(case: Case) -> Iterator[str]:
    if case.experts and case.settings.moe.dispatcher == "allgather" and case.layout.pipeline > 1:
        yield problem(
            f"moe.dispatcher = allgather with layout.pipeline = {case.layout.pipeline}",
            "packs differ in length, and Megatron does not send such packs between stages with this dispatcher",
            "Set moe.dispatcher=alltoall, or layout.pipeline=1",
        )


def flex_dispatcher(case: Case) -> Iterator[str]:
    """DeepEP: https://github.com/deepseek-ai/DeepEP."""
    layout, chosen = case.layout, case.settings.moe.dispatcher == "flex" and case.experts is not None
    if chosen and case.settings.device.kind == "cpu":
        yield problem(
            "moe.dispatcher = flex with device.kind = cpu",
            "DeepEP moves tokens between GPUs",
            "Set moe.dispatcher=alltoall or allgather",
        )
    if chosen and layout.expert * layout.expert_tensor == 1:
        yield problem(
            "moe.dispatcher = flex with layout.expert = 1, layout.expert_tensor = 1",
            "every rank holds all experts, there is nothing to dispatch",
            "Raise layout.expert, or set moe.dispatcher=alltoall",
        )
    if chosen and case.settings.precision.dtype != "bfloat16":
        yield problem(
            f"moe.dispatcher = flex with precision.dtype = {case.settings.precision.dtype}",
            "DeepEP adds up what the experts return in bfloat16 only",
            "Set precision.dtype=bfloat16, or moe.dispatcher=alltoall",
        )


RULES: tuple[Rule, ...] = (
    moe_settings_need_a_moe_model,
    bias_update_needs_a_bias,
    allgather_dispatcher,
    flex_dispatcher,
)

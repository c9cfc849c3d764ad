"""Megatron's optimizer, stepped only with finite numbers, and its state in terms of parameters.

Upstream keeps dense and expert parameters in two chained optimizers, shards them flat over data-parallel ranks or not, and
keeps float32 masters for bfloat16 weights. `states()` hides all that: for each parameter it yields the flat range that this
rank keeps, and the tensors over it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Layout
from megatron_rl.policy.model import Model
from megatron_rl.policy.schedule import learning_rate, weight_decay

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """What this rank keeps of one parameter's optimizer state: the flat range start … stop of the parameter."""

    name: str
    start: int
    stop: int
    tensors: dict[str, Tensor]  # each flat [stop - start]: the moments, and "main" where a float32 master exists


class Optimizer:
    """AdamW over a model's chunks."""

    def __init__(self, model: Model, settings: Settings, layout: Layout) -> None:
        self.settings = settings.optimizer
        self.total_steps = settings.optimizer_steps
        self.model = model
        bf16 = settings.precision.dtype == "bfloat16"
        config = OptimizerConfig(
            optimizer="adam",
            lr=self.settings.lr,
            min_lr=self.settings.min_lr,
            weight_decay=self.settings.weight_decay,
            adam_beta1=self.settings.beta1,
            adam_beta2=self.settings.beta2,
            adam_eps=self.settings.eps,
            clip_grad=self.settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=settings.layout.distributed_optimizer,
            overlap_param_gather=settings.layout.overlap_param_gather,
        )
        chained = get_megatron_optimizer(config, list(model.chunks), use_gloo_process_groups=False, pg_collection=layout.groups)
        assert isinstance(chained, ChainedOptimizer)
        self.chained = chained

    def zero_grad(self) -> None:
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.chained.zero_grad()

    def gradient_norm(self) -> float:
        """The norm of the whole model's gradient, all ranks together. Gradients must be reduced already."""
        self.chained.prepare_grads()
        return float(self.chained.get_grad_norm())

    def step(self, step: int, grad_norm: float) -> None:
        """Clip by the given (finite) norm of the whole gradient and update the weights with the rates of `step`."""
        rate = learning_rate(self.settings, step, self.total_steps)
        decay = weight_decay(self.settings, step, self.total_steps)
        for group in self.chained.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = decay * group.get("wd_mult", 1.0)
        if self.settings.clip_grad > 0 and grad_norm > 0:
            assert math.isfinite(grad_norm)
            for optimizer in self._parts():
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=self.settings.clip_grad, total_norm=grad_norm)
        self.chained.step_with_ready_grads()

    def gather_weights(self) -> None:
        """Make sure that every rank's weights are the updated ones (with overlap_param_gather they arrive later)."""
        for chunk in self.model.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    # -- state ---------------------------------------------------------------------------------------------------------

    def states(self) -> Iterator[ParameterState]:
        """This rank's share of the optimizer state, made first if no step has been taken yet. Tensors are the live ones."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self._parts():
            _create_moments(optimizer)
            for parameter, start, stop, key in _kept(optimizer):
                state = optimizer.optimizer.state[key]
                tensors = {moment: state[moment].view(-1) for moment in MOMENTS}
                if parameter.dtype != torch.float32:
                    tensors["main"] = key.data.view(-1)
                yield ParameterState(names[parameter], start, stop, tensors)

    def start_from_weights(self) -> None:
        """A fresh state: no moments, no steps, and masters that are the present weights."""
        parameters = dict(self.model.named_parameters())
        for state in self.states():
            for moment in MOMENTS:
                state.tensors[moment].zero_()
            if "main" in state.tensors:
                state.tensors["main"].copy_(parameters[state.name].data.view(-1)[state.start : state.stop])
        self.set_steps_taken(0)

    def set_steps_taken(self, steps: int) -> None:
        """Set Adam's own count of steps (its bias correction) after a load."""
        for optimizer in self._parts():
            set_adam_steps(optimizer.optimizer, steps)

    def _parts(self) -> list[Any]:
        return [part for part in self.chained.chained_optimizers if not part.is_stub_optimizer and part.get_parameters()]


def counts_per_tensor(inner: Any) -> bool:
    """torch's Adam counts steps in each tensor's state; fused ones (Transformer Engine's, apex's) in the group."""
    return isinstance(inner, torch.optim.Adam)


def set_adam_steps(inner: Any, steps: int) -> None:
    """Fused Adams make their count at the first step and start from 1 when they find none: so it is made here."""
    if counts_per_tensor(inner):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps))
    else:
        for group in inner.param_groups:
            group.pop("step", None)
            if group["params"] and steps:
                group["step"] = steps


def _create_moments(optimizer: Any) -> None:
    """Adam makes its moments at the first step; a checkpoint needs a place to load them into."""
    inner = optimizer.optimizer
    for group in inner.param_groups:
        for tensor in group["params"]:
            state = inner.state[tensor]
            if counts_per_tensor(inner) and "step" not in state:
                state["step"] = torch.tensor(0.0)
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(tensor, dtype=torch.float32)


def _kept(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, int, int, Tensor]]:
    """(parameter, start, stop, key of its state) for each parameter that this optimizer keeps state of on this rank."""
    if isinstance(optimizer, DistributedOptimizer):
        for buffer_ranges in optimizer.gbuf_ranges:
            for ranges_of_dtype in buffer_ranges.values():
                for bucket in ranges_of_dtype:
                    for parameter, ranges in bucket["param_map"].items():
                        group, place = optimizer.model_param_group_index_map[parameter]
                        key = optimizer.optimizer.param_groups[group]["params"][place]
                        yield parameter, ranges["param"].start, ranges["param"].end, key
        return
    for parameter, key in _replicated(optimizer):
        yield parameter, 0, parameter.numel(), key


def _replicated(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    if hasattr(optimizer, "fp32_from_float16_groups"):
        for parameters, masters in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield from zip(parameters, masters, strict=True)
        for parameters in optimizer.fp32_from_fp32_groups:
            yield from zip(parameters, parameters, strict=True)
        return
    for group in optimizer.optimizer.param_groups:
        yield from zip(group["params"], group["params"], strict=True)

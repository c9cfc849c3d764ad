"""An independent float64 reference: the model as transformers computes it, one sequence at a time, gradients by autograd."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class _InFloat64(TorchFunctionMode):
    """transformers computes norms, routing, softmax and rotary angles in float32 whatever the model's type; here in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        widen = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def hf_config(fields: Mapping[str, Any]) -> PretrainedConfig:
    """transformers' config object. Kimi-K2 is DeepSeek-V3 under another name, and transformers only knows the latter."""
    fields = dict(fields)
    model_type = fields.pop("model_type")
    return AutoConfig.for_model("deepseek_v3" if model_type == "kimi_k2" else model_type, **fields)


class Oracle:
    """A float64 model with random weights: matrices, norms, biases and the routers' choice biases are all non-trivial."""

    def __init__(self, fields: Mapping[str, Any], seed: int = 0) -> None:
        with _InFloat64():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                hf_config(fields), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
            )
        self._mend_deepseek_v2()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * fields["initializer_range"]
                tensor.copy_(1 + noise if "norm" in name else noise)
            for name, tensor in self.model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2)

    def _mend_deepseek_v2(self) -> None:
        """Two errors of transformers 5.12's DeepSeek-V2, against the authors' modeling_deepseek.py and SGLang.

        The softmax lacks YaRN's factor m(mscale_all_dim)^2 (huggingface/transformers pull request 47435), and group-limited
        routing reads a num_experts that is never set.
        """
        if self.model.config.model_type != "deepseek_v2":
            return
        rope = self.model.config.rope_parameters
        for layer in self.model.model.layers:
            if rope["rope_type"] == "yarn":
                layer.self_attn.scaling *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
            layer.mlp.num_experts = self.model.config.n_routed_experts

    def log_probs(self, sequences: Sequence[Tensor], temperature: float = 1.0) -> list[Tensor]:
        """For each sequence the log-probability of every token but the first given those before it, with its graph."""
        tables = self._tables(sequences, temperature)
        return [table.gather(-1, tokens[1:, None]).squeeze(-1) for table, tokens in zip(tables, sequences, strict=True)]

    def entropies(self, sequences: Sequence[Tensor], temperature: float = 1.0) -> list[Tensor]:
        """For each sequence the entropies of the distributions that every token but the first was drawn from."""
        return [-(table.exp() * table).sum(-1) for table in self._tables(sequences, temperature)]

    def _tables(self, sequences: Sequence[Tensor], temperature: float) -> list[Tensor]:
        """log softmax(logits / temperature) before every token but the first, each [length - 1, vocab]."""
        return [(self.logits(tokens)[:-1] / temperature).log_softmax(-1) for tokens in sequences]

    def logits(self, tokens: Tensor) -> Tensor:
        """[length, vocab] of one sequence."""
        with _InFloat64():
            logits: Tensor = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        return logits

    def state(self) -> dict[str, Tensor]:
        """The weights under transformers' names, choice biases included."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of a loss by every parameter, under transformers' names."""
        named = dict(self.model.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

"""Our Megatron tensors against an outside bridge's, on a tiny Qwen3-MoE that is made on the spot.

    python tools/oracle_bridge.py

The bridge is mbridge, which is no dependency of this project: install it beside it (pip install --no-deps mbridge). It loads
a Hugging Face folder into a Megatron model by its own hand-written rules; `megatron-rl convert` writes the same folder as a
Megatron checkpoint. Every parameter must be the same bits. Ends with an error when one is not.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rl.config.settings import Settings
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.weights.boxes import Box
from megatron_rl.weights.convert import Conversion, convert
from megatron_rl.weights.sources import MegatronSource

CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
EXPERT = "mlp.experts.linear_fc"


def main() -> None:
    if importlib.util.find_spec("mbridge") is None:
        raise SystemExit("mbridge is not installed, and nothing was compared. Install it: pip install --no-deps mbridge")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root / "hf")
        convert(Conversion(root / "hf", root / "megatron", "megatron"))
        settings = {"policy": {"config": root / "hf"}, "precision": {"dtype": "float32"}, "batch": {"max_tokens": 64}}
        policy = Policy.open(Settings.model_validate(settings), Launch())
        (chunk,) = policy.model.bare_chunks
        load_by_mbridge(root / "hf", chunk)
        compared = compare(MegatronSource(root / "megatron"), dict(chunk.named_parameters()))
        policy.close()
    print(f"mbridge: {compared} parameters of Megatron, every one the same bits as ours")


def write_model(folder: Path) -> None:
    """By transformers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they start as ones, which tell nothing
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def load_by_mbridge(folder: Path, chunk: torch.nn.Module) -> None:
    """Let it fill a Megatron model. Its own would need Transformer Engine, whose parameter names ours has."""
    import mbridge.core.util as util

    if not hasattr(util.ModelType, "encoder_and_decoder"):  # which Megatron-core has given up
        util.ModelType = SimpleNamespace(encoder_and_decoder=None, encoder_or_decoder=util.ModelType.encoder_or_decoder)
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(str(folder))
    bridge.dtype = torch.float32
    bridge.load_weights([chunk], str(folder))


def compare(ours: MegatronSource, theirs: dict[str, torch.nn.Parameter]) -> int:
    """Their parameters are named as ours, but for experts, which are a parameter each."""
    left = {name: rule.shape[0] if rule.experts else 1 for name, rule in ours.weight_map.rules.items()}
    for name, parameter in theirs.items():
        key, box = place_of(ours, name)
        values: Tensor = ours.megatron(key, box).view(parameter.shape)
        if not torch.equal(values, parameter.detach()):
            raise SystemExit(f"{name} differs from {key} {box}")
        left[key] -= 1
    missing = [name for name, count in left.items() if count]
    if missing:
        raise SystemExit(f"the bridge has not all of {', '.join(missing)}")
    return len(theirs)


def place_of(source: MegatronSource, name: str) -> tuple[str, Box]:
    """The tensor, and the box of it, that a parameter of a whole model is."""
    layer, sign, expert = name.partition(EXPERT)
    if not sign:
        shape = source.weight_map.rules["model." + name].shape
        return "model." + name, ((0,) * len(shape), shape)
    number, _, index = expert.partition(".weight")
    key = f"model.{layer}mlp.experts.experts.linear_fc{number}.weight"
    shape = source.weight_map.rules[key].shape
    return key, ((int(index), *(0,) * (len(shape) - 1)), (1, *shape[1:]))


if __name__ == "__main__":
    main()

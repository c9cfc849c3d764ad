"""The models that are tried, the settings they are tried under, and what they read: random, and the same everywhere."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

import numpy as np  # noqa: E402

from megatron_rl.config.checks import require_valid  # noqa: E402
from megatron_rl.config.families import read_architecture  # noqa: E402
from megatron_rl.config.settings import Settings  # noqa: E402
from megatron_rl.data.toy_tokenizer import END, PAD  # noqa: E402
from megatron_rl.policy.layout import Launch, Layout  # noqa: E402
from megatron_rl.policy.policy import Policy  # noqa: E402
from megatron_rl.rollout.bank.reader import BankReader  # noqa: E402
from megatron_rl.rollout.bank.sealed import SealedStep  # noqa: E402
from megatron_rl.rollout.bank.writer import Bank  # noqa: E402
from megatron_rl.types import Group, Prompt, Sample, Segment  # noqa: E402
from megatron_rl.types import Sequence as TokenSequence  # noqa: E402
from tools.gpu_acceptance.child import Skip  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A mixture of experts in the form of Qwen3-MoE, and how much it reads at a time."""

    hidden: int
    layers: int
    heads: int
    head_size: int
    experts: int
    chosen: int
    expert_hidden: int
    vocabulary: int
    sequences: int  # of a step
    longest: int
    pack: int  # tokens
    threads: int | None = None  # of a CPU; None: all

    def config(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "moe_intermediate_size": self.expert_hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(2, self.heads // 4),
            "head_dim": self.head_size,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": True,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "hidden_act": "silu",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "tie_word_embeddings": False,
            "eos_token_id": END,
            "pad_token_id": PAD,
            "torch_dtype": "bfloat16",
        }


# 1.4 billion parameters, 0.4 of them active: the layers of Qwen3-30B-A3B, but eight of them, with 4 of 32 experts each.
MIDDLE = Shape(2048, 8, 16, 128, 32, 4, 768, 32768, sequences=32, longest=1024, pack=4096)
# 36 million: what a CPU computes in float32 within a minute or two.
SMALL = Shape(512, 4, 8, 64, 16, 4, 256, 8192, sequences=12, longest=256, pack=1024)
TINY = Shape(128, 2, 4, 64, 4, 2, 128, 512, sequences=6, longest=40, pack=128, threads=1)


def middle(smoke: bool) -> Shape:
    return TINY if smoke else MIDDLE


def small(smoke: bool) -> Shape:
    return TINY if smoke else SMALL


def precision(format: str) -> dict[str, str]:
    """The section of the settings for a format of `parts`."""
    name = format.removeprefix("te-")
    if name in ("float32", "bfloat16"):
        return {"dtype": name}
    by = "transformer_engine" if format.startswith("te-") else "simulated"
    return {"dtype": "bfloat16", "fp8": by, "fp8_recipe": name.removeprefix("simulated-")}


def settings_of(shape: Shape, folder: Path, **sections: Any) -> Settings:
    """A run's settings for the model; sections are added to what all have."""
    path = folder / "model" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shape.config()), encoding="utf-8")
    common: dict[str, Any] = {
        "policy": {"config": path.parent},
        "batch": {"max_tokens": shape.pack},
        "optimizer": {"lr": 1e-4},
        "device": {"threads": shape.threads},
        "run": {"directory": folder / "run"},
    }
    return Settings.model_validate({**common, **sections})


@contextmanager
def opened(settings: Settings, format: str | None = None) -> Iterator[Policy]:
    """A policy whose layers are Transformer Engine's or torch's as the format says; without one, as any run has them here."""
    require_recipe(settings)
    launch = Launch.from_environment()
    architecture = read_architecture(settings.policy.config)
    require_valid(settings, architecture, launch.world_size)
    layout = Layout.open(settings, launch)
    if format is not None and not format.startswith("te-"):
        layout = replace(layout, device=replace(layout.device, transformer_engine=False))
    policy = Policy(settings, architecture, layout)
    try:
        yield policy
    finally:
        policy.close()


def require_recipe(settings: Settings) -> None:
    """Skip what Transformer Engine cannot do on this chip."""
    if settings.precision.fp8 != "transformer_engine":
        return
    there, reason = recipes()[settings.precision.fp8_recipe]
    if not there:
        raise Skip(f"Transformer Engine: {reason}")


def recipes() -> Mapping[str, tuple[bool, str]]:
    """By each FP8 recipe whether this chip has it, and if not why, in Transformer Engine's words."""
    import transformer_engine.pytorch as te

    whole = te.is_fp8_available(return_reason=True)
    return {
        "tensorwise": whole,
        "delayed": whole,
        "blockwise": te.is_fp8_block_scaling_available(return_reason=True),
        "mxfp8": te.is_mxfp8_available(return_reason=True),
    }


# -- what is read ----------------------------------------------------------------------------------------------------------


def sequences(shape: Shape, seed: int, *, pattern: bool = False) -> list[TokenSequence]:
    """Sequences of unequal lengths; a quarter of each is its prompt. With `pattern` there is something to learn."""
    generator = np.random.default_rng([shape.vocabulary, seed])
    found = []
    for index in range(shape.sequences):
        length = int(generator.integers(shape.longest // 2, shape.longest + 1))
        tokens = _pattern(generator, shape, length) if pattern else generator.integers(0, shape.vocabulary, length)
        mask = np.arange(length) >= max(1, length // 4)
        found.append(TokenSequence(index, tokens.astype(np.int64), mask))
    return found


def _pattern(generator: np.random.Generator, shape: Shape, length: int) -> np.ndarray:
    """[length] each token is the one before times five plus one, of 251, but for one in ten that is drawn."""
    alphabet = min(251, shape.vocabulary)
    tokens = generator.integers(0, alphabet, length)
    kept = generator.random(length) < 0.9
    for place in range(1, length):
        if kept[place]:
            tokens[place] = (5 * tokens[place - 1] + 1) % alphabet
    return tokens


@contextmanager
def sealed_step(shape: Shape, folder: Path) -> Iterator[SealedStep]:
    """A bank's step of made-up samples, groups of four with rewards of 0 and 1: what a learner reads."""
    given = sequences(shape, seed=1)
    with Bank(folder) as bank:
        for number in range(0, len(given), 4):
            prompt = Prompt(f"p{number}", given[number].tokens[:8])
            samples = tuple(_sample(prompt, sequence) for sequence in given[number : number + 4])
            bank.append(Group(f"p{number}@0", prompt, samples, step=0))
        bank.seal(0)
    with BankReader(folder) as reader, reader.step(0) as rows:
        yield rows


def _sample(prompt: Prompt, sequence: TokenSequence) -> Sample:
    """An answer to the prompt, scored as an engine would have that knows nothing."""
    tokens = np.concatenate([prompt.tokens, sequence.tokens[len(prompt.tokens) :]])
    start, stop = len(prompt.tokens), len(tokens)
    segments = (Segment(0, start, "prompt"), Segment(start, stop, "policy", version=0))
    log_probs = np.zeros(stop, np.float32)
    log_probs[start:] = -5.0
    reward = float(sequence.index % 2)
    return Sample(tokens, log_probs, segments, "stop", {"made_up": reward}, reward)

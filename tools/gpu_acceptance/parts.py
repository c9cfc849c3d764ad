"""Which parts there are: what each tries, what it needs, where its code is, how long it may take.

A format names the numbers and the layers that a policy computes with: `te-…` are Transformer Engine's layers, the others plain
torch's, which megatron-rl uses where Transformer Engine is not installed. Parts know nothing of one another but files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# What is imported, whether or not megatron-rl is installed as a package.
POLICY = ("torch", "megatron.core", "numpy", "pydantic", "pyarrow", "rich", "aiohttp", "httpx")
ENGINE = (*POLICY, "transformer_engine")
SERVER = (*POLICY, "sglang", "datasets", "yaml", "orjson", "transformers")

TORCH = ("bfloat16",)
SIMULATED = ("simulated-tensorwise", "simulated-blockwise", "simulated-mxfp8")
RECIPES = ("te-tensorwise", "te-blockwise", "te-mxfp8")
LEARNED = (*TORCH, "te-bfloat16", *RECIPES)  # whose throughput is measured
LAYOUTS = ("tensor", "expert", "pipeline", "context")
REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Part:
    """One thing to try, in a process of its own."""

    name: str
    work: str  # module:function of this package
    about: str
    packages: tuple[str, ...] = POLICY
    gpus: int = 1  # that it takes, unless it is the smoke test of something that a CPU can do as well
    ranks: int = 1
    seconds: int = 60  # that it is guessed to take; nobody has measured that
    limit: int = 300  # after so many it is ended
    reads: str | None = None  # a file of the folder
    writes: str | None = None  # without which it is not done
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """What is behind the first word: a format, a layout, or nothing."""
        return self.name.partition(" ")[2]


def _packages(name: str) -> tuple[str, ...]:
    return ENGINE if name.startswith("te-") else POLICY


def _numbers() -> list[Part]:
    strict = {"NVIDIA_TF32_OVERRIDE": "0"}  # cuBLAS may else round the operands of float32 products to ten bits
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    reference = Part(
        "reference",
        "numbers:reference",
        "the same policy on the CPU in float32, which others are compared with",
        gpus=0,
        seconds=90,
        limit=540,
        writes=REFERENCE,
        environment=hidden,
    )
    same = [
        Part(
            f"equal {name}",
            "numbers:equal",
            "a policy on the GPU over NCCL against the reference: scores, loss, gradient, scores after an update",
            packages=_packages(name),
            reads=REFERENCE,
            environment=strict if name.endswith("float32") else {},
        )
        for name in ("float32", "bfloat16", "te-float32", "te-bfloat16")
    ]
    layouts = [
        Part(
            f"layout {name}",
            "numbers:layout",
            "two ranks over NCCL, one GPU each, in float32 against the reference",
            gpus=2,
            ranks=2,
            reads=REFERENCE,
            environment=strict,
        )
        for name in LAYOUTS
    ]
    return [reference, *same, *layouts]


def _learning() -> list[Part]:
    ratio = [
        Part(
            f"ratio {name}",
            "learning:ratio",
            "new over old probability of every token before anything is learned: exactly 1",
            packages=_packages(name),
            seconds=60,
        )
        for name in (*TORCH, *SIMULATED, "te-bfloat16", *RECIPES)
    ]
    delayed = Part(
        "ratio te-delayed",
        "learning:refused",
        "scales out of a history cannot keep that promise: settings that ask for them are refused",
        gpus=0,
        seconds=20,
        limit=120,
    )
    update = [
        Part(
            f"update {name}",
            "learning:update",
            "training steps of a mixture of experts of 1.4 billion parameters: tokens a second, MFU, memory",
            packages=_packages(name),
            seconds=90,
        )
        for name in LEARNED
    ]
    loss = [
        Part(
            f"loss {name}",
            "learning:loss",
            "the loss of 50 optimizer steps on the same data",
            packages=_packages(name),
            seconds=120,
        )
        for name in (*TORCH, *SIMULATED, "te-bfloat16", *RECIPES)
    ]
    return [*ratio, delayed, *update, *loss]


PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part(
            "environment",
            "machine:environment",
            "driver, GPU, packages, FP8 recipes of the chip",
            packages=("torch",),
            gpus=0,
            seconds=20,
            limit=120,
        ),
        Part(
            "ceilings",
            "machine:ceilings",
            "what the device moves and multiplies at most, measured",
            packages=("torch",),
            seconds=20,
            limit=120,
        ),
        Part(
            "logprobs",
            "kernels:logprobs",
            "the log-probability kernel against what its bytes and products take at least",
            packages=("torch",),
        ),
        *_numbers(),
        *_learning(),
        Part(
            "colocated",
            "serving:colocated",
            "an SGLang server on the trainer's GPU: memory given back and taken, weights through shared memory",
            packages=SERVER,
            seconds=180,
            limit=540,
        ),
        *(
            Part(
                f"mismatch {name}",
                "serving:mismatch",
                "a step of training with such a server: how far its log-probs are from the policy's, without and with R3",
                packages=(*SERVER, *(("transformer_engine",) if name.startswith("te-") else ())),
                seconds=240,
                limit=570,
            )
            for name in ("bfloat16", "te-blockwise")
        ),
    )
}


def chosen(only: list[str] | None) -> list[Part]:
    """The parts whose names begin with any of these words, whole words; all without any. Whoever they read from comes along."""
    if not only:
        return list(PARTS.values())
    unknown = [word for word in only if not any(_begins(name, word) for name in PARTS)]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: no part's name begins so. --list names them.")
    names = {name for name in PARTS if any(_begins(name, word) for word in only)}
    read = {part.reads for part in PARTS.values() if part.name in names}
    return [part for part in PARTS.values() if part.name in names or (part.writes is not None and part.writes in read)]


def _begins(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word} ")

"""Published runs, and what the plan says of them: tables of docs/clusters.md. `python tools/plan_published.py` prints them.

Rows that a number or a formula was chosen with in view are marked as fitted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.architecture import Architecture, Experts, LatentAttention, Rope
from megatron_rl.config.settings import Settings
from megatron_rl.plan.job import Job, Workload
from megatron_rl.plan.machine import find_machine
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.publishing import publish_seconds
from megatron_rl.plan.serving import decode_seconds, free_for_servers, rollout_time, server_memory, server_of

NVIDIA = "NVIDIA, Megatron Bridge performance summary, "


def dense(layers: int, hidden: int, heads: int, kv_heads: int, ffn_hidden: int, vocab: int, family: str) -> Architecture:
    return Architecture(
        family=family, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=128, ffn_hidden=ffn_hidden,
        vocab=vocab, max_positions=131072, norm_eps=1e-6, rope=Rope(base=1e6), tied_embeddings=False,
        moe_layers=(False,) * layers,
    )  # fmt: skip


def mixture(model: Architecture, count: int, top_k: int, hidden: int, **more: Any) -> Architecture:
    experts = Experts(
        count=count, top_k=top_k, hidden=hidden, scoring="softmax", normalize_top_k=True, softmax_before_top_k=True, **more
    )
    return replace(model, experts=experts, moe_layers=(True,) * model.layers)


LLAMA_70B = dense(80, 8192, 64, 8, 28672, 128256, "llama")
LLAMA_405B = dense(126, 16384, 128, 8, 53248, 128256, "llama")
QWEN3_30B = mixture(dense(48, 2048, 32, 4, 6144, 151936, "qwen3_moe"), 128, 8, 768)
QWEN3_235B = mixture(dense(94, 4096, 64, 4, 12288, 151936, "qwen3_moe"), 128, 8, 1536)
MIXTRAL = mixture(dense(32, 4096, 32, 8, 14336, 32000, "mixtral"), 8, 2, 14336)
DEEPSEEK_V3 = replace(
    mixture(
        dense(61, 7168, 128, 128, 18432, 129280, "deepseek_v3"), 256, 8, 2048, shared_hidden=2048, groups=8, top_k_groups=4
    ),
    moe_layers=(False,) * 3 + (True,) * 58,
    latent_attention=LatentAttention(q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
)


@dataclass(frozen=True)
class Run:
    """A training run of full sequences, as it was published."""

    name: str
    model: Architecture
    machine: str
    gpus: int
    fp8: bool
    sequences: int  # of an optimizer step
    pack: int  # sequences
    length: int
    layout: dict[str, Any]
    measured: float  # tokens a second and GPU
    source: str
    fitted: bool = False
    recompute: tuple[str, ...] = ()

    @property
    def job(self) -> Job:
        machine = find_machine(self.machine)
        costs = machine.costs.model_copy(update={"packing": 1.0, "imbalance": 1.0})  # full sequences, tokens dealt evenly
        settings = Settings.model_validate(
            {
                "policy": {"config": self.name},
                "layout": {"overlap_grad_reduce": True, "overlap_param_gather": True, **self.layout},
                "moe": {"dispatcher": "flex"},
                "precision": {"fp8": "transformer_engine" if self.fp8 else "off"},
                "recompute": {"mode": "selective" if self.recompute else "none", "modules": self.recompute or ("core_attn",)},
                "batch": {"max_tokens": self.pack * self.length},
            }
        )
        work = Workload(self.sequences, 1, prompt=1, response=self.length - 1, longest=self.length - 1)
        return Job(settings, self.model, self.gpus, machine.model_copy(update={"costs": costs}), work)

    @property
    def predicted(self) -> float:
        """Tokens a second and GPU."""
        return self.sequences * self.length / Plan(self.job).training.optimizer_step / self.gpus

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def layout(tensor: int, pipeline: int, virtual: int, context: int = 1, expert: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "context": context, "expert": expert, **more
    }  # fmt: skip


def _split(layers: int, chunks: int) -> tuple[int, ...]:
    """Evenly, with fewer at both ends."""
    each, extra = divmod(layers, chunks)
    ends = chunks - extra
    return (each,) * (ends // 2) + (each + 1,) * extra + (each,) * (ends - ends // 2)


RUNS = (
    Run("Llama 3 70B", LLAMA_70B, "h100", 64, True, 256, 1, 8192, layout(4, 8, 5), 1621, NVIDIA + "26.02"),
    Run("Llama 3.1 405B", LLAMA_405B, "h100", 1024, True, 1536, 1, 8192,
        layout(8, 8, 8, 2, pipeline_layers=_split(126, 64)), 311, NVIDIA + "26.02"),
    Run("Qwen3 30B-A3B", QWEN3_30B, "h100", 16, True, 1024, 1, 4096, layout(1, 2, 12, expert=8), 5113,
        NVIDIA + "26.02", fitted=True),
    Run("Qwen3 30B-A3B", QWEN3_30B, "h100", 16, True, 512, 2, 4096, layout(1, 2, 24, expert=8), 5275, NVIDIA + "25.11"),
    Run("Qwen3 235B-A22B", QWEN3_235B, "h100", 256, True, 8192, 1, 4096,
        layout(2, 8, 4, expert=32, pipeline_layers=_split(94, 32)), 1633, NVIDIA + "26.02"),
    Run("DeepSeek-V3", DEEPSEEK_V3, "h100", 1024, True, 8192, 1, 4096,
        layout(2, 8, 4, expert=64, pipeline_layers=_split(61, 32)), 1297, NVIDIA + "25.09, with MTP",
        recompute=("mla_up_proj", "mlp")),
    Run("DeepSeek-V3", DEEPSEEK_V3, "h800", 2048, True, 15360, 1, 4096,
        layout(1, 16, 1, expert=64, pipeline_layers=_split(61, 16)), 1543,
        "DeepSeek-V3 technical report (arXiv 2412.19437): 180,000 H800-hours for 10^12 tokens",
        recompute=("mla_up_proj", "layernorm")),
    Run("Mixtral 8x7B", MIXTRAL, "h100", 64, False, 256, 1, 4096, layout(1, 4, 8, expert=8), 5645,
        "Megatron-core 0.9, MoE README: 468 TFLOPS at 82.9 GFLOP a token"),
    Run("Qwen3 30B-A3B", QWEN3_30B, "b200", 8, True, 512, 1, 4096, layout(1, 1, 1, expert=8), 9691,
        NVIDIA + "26.02", fitted=True),
    Run("Qwen3 235B-A22B", QWEN3_235B, "b200", 256, True, 8192, 1, 4096,
        layout(1, 8, 1, expert=8, pipeline_layers=_split(94, 8)), 3805, NVIDIA + "26.02", fitted=True),
    Run("DeepSeek-V3", DEEPSEEK_V3, "b200", 256, True, 4096, 1, 4096,
        layout(1, 16, 1, expert=8, pipeline_layers=_split(61, 16)), 2689, NVIDIA + "26.02",
        recompute=("mla_up_proj",)),
    Run("Qwen3 235B-A22B", QWEN3_235B, "gb200", 256, False, 8192, 1, 4096,
        layout(1, 8, 3, expert=32, pipeline_layers=_split(94, 24)), 4916, NVIDIA + "25.11"),
    Run("DeepSeek-V3", DEEPSEEK_V3, "gb200", 256, False, 4096, 1, 4096,
        layout(1, 4, 4, expert=64, pipeline_layers=_split(61, 16)), 3139, NVIDIA + "25.11, without MTP",
        recompute=("mla_up_proj",)),
)  # fmt: skip


# -- servers -----------------------------------------------------------------------------------------------------------

GPUSTACK = "GPUStack performance lab, SGLang 0.5.5, ShareGPT, all requests at once"
QWEN3_14B = dense(40, 5120, 40, 8, 17408, 151936, "qwen3")


@dataclass(frozen=True)
class Served:
    """Something that servers did, as it was published, and the plan's number for the same."""

    what: str
    model: Architecture
    sglang: dict[str, Any]
    work: Workload
    unit: str  # seconds until the last response has ended, or tokens a second and GPU when all requests run, or to publish
    measured: float
    source: str
    fitted: bool = False

    @property
    def predicted(self) -> float:
        colocated = {"placement": "colocated"} if self.unit == PUBLISH else {}
        settings = Settings.model_validate({"policy": {"config": self.what}, "sglang": self.sglang, "servers": colocated})
        job = Job(settings, self.model, 8, find_machine("h100"), self.work)
        server = server_of(settings)
        if self.unit == PUBLISH:
            return publish_seconds(job, server, 8 // server.gpus)
        if self.unit == SECONDS:
            return rollout_time(job, server, server_memory(job, server, free_for_servers(job, 0)), 1).seconds
        length = self.work.prompt + self.work.response / 2
        return self.work.groups / decode_seconds(job, server, self.work.groups, length) / server.gpus

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


SECONDS, RATE, PUBLISH = "s for all responses", "tokens/s and GPU", "s to publish"
LARGE_SCALE = {"tp_size": 72, "dp_size": 72, "enable_dp_attention": True, "quantization": "fp8"}

SERVED = (
    Served("Qwen3 14B, bfloat16, 1 GPU, 1,000 requests", QWEN3_14B, {}, Workload(1000, 1, 217, 202, 1500),
           SECONDS, 49.9, GPUSTACK),
    Served("Qwen3 14B, FP8, 1 GPU, 1,000 requests", QWEN3_14B, {"quantization": "fp8"}, Workload(1000, 1, 217, 202, 1500),
           SECONDS, 40.2, GPUSTACK),
    Served("Qwen3 235B-A22B, bfloat16, tp_size 8, 984 requests", QWEN3_235B, {"tp_size": 8}, Workload(984, 1, 218, 197, 1500),
           SECONDS, 53.2, GPUSTACK),
    Served("DeepSeek-V3, FP8, 72 GPUs, 256 requests on each", DEEPSEEK_V3, LARGE_SCALE, Workload(256 * 72, 1, 2000, 100, 100),
           RATE, 22300 / 8, "LMSYS blog of 2025-05-05: 22,300 tokens a second and node of decoding, with two-batch overlap",
           fitted=True),
    Served("Qwen3 30B-A3B to servers on its own 8 GPUs", QWEN3_30B, {"tp_size": 8}, Workload(1, 1, 1, 1, 1), PUBLISH, 7.0,
           "slime, blog on weight synchronisation, 2025", fitted=True),
)  # fmt: skip


def served_lines() -> Iterator[str]:
    """The table as Markdown."""
    yield "| servers on H100 | published | plan | error | source |"
    yield "| --- | --- | --- | --- | --- |"
    for run in SERVED:
        mark = " (fitted)" if run.fitted else ""
        yield (
            f"| {run.what} | {run.measured:,.4g} {run.unit} | {run.predicted:,.4g} | {run.error:+.0%}{mark} | {run.source} |"
        )


def training_lines() -> Iterator[str]:
    """The table as Markdown."""
    yield "| run | GPUs | format | layout | published | plan | error | source |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for run in RUNS:
        sizes = ", ".join(f"{name} {size}" for name, size in run.layout.items() if name != "pipeline_layers" and size != 1)
        mark = " (fitted)" if run.fitted else ""
        yield (
            f"| {run.name} | {run.gpus} x {run.machine} | {'FP8' if run.fp8 else 'bfloat16'} | {sizes} | {run.measured:,.0f} | "
            f"{run.predicted:,.0f} | {run.error:+.0%}{mark} | {run.source} |"
        )


if __name__ == "__main__":
    print("\n".join([*training_lines(), "", *served_lines()]))

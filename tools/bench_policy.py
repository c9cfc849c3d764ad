"""What the policy costs on top of Megatron-core: our update against a bare forward, backward and optimizer step.

Both run on the same packs, layout, model and optimizer, in turns, in one process group; the ratio of their medians is the
overhead. Bare means Megatron's schedule over the same chunks with its own vocabulary-parallel cross-entropy as the loss and
`optimizer.step()`: no log-probs, objective, divisors, metrics or checks for non-finite numbers. The time of our update with
that same cross-entropy in place of the fused head is shown too, so that what the head costs (it recomputes the logits rather
than keep them) is told apart from what the policy costs. Logits' memory: see tools/bench_logprobs.py.

    python tools/bench_policy.py                                  one rank
    torchrun --nproc-per-node 2 tools/bench_policy.py --expert 2  a layout
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from megatron_rl.config.settings import Settings  # noqa: E402
from megatron_rl.objectives.base import Mean, ObjectiveResult, TokenBatch  # noqa: E402
from megatron_rl.objectives.gspo import SequencePolicyLoss  # noqa: E402
from megatron_rl.policy.batch import PackTensors, pack_tensors  # noqa: E402
from megatron_rl.policy.layout import Launch  # noqa: E402
from megatron_rl.policy.policy import Policy  # noqa: E402
from megatron_rl.types import Pack, Sequence  # noqa: E402


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 8, "experts": 16, "top_k": 2, "vocab": 8192, "sequences": 16, "length": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")
    for name in ("tensor", "pipeline", "expert", "context"):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help="parallel size")
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="tokens of a pack")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds, after one that is not")
    return parser.parse_args(words)


def settings(options: argparse.Namespace, folder: Path) -> Settings:
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "intermediate_size": 2 * options.hidden,
        "moe_intermediate_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 32,
        "num_key_value_heads": max(options.hidden // 64, 1),
        "head_dim": 32,
        "num_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    layout = {name: getattr(options, name) for name in ("tensor", "pipeline", "expert", "context")}
    return Settings.model_validate(
        {
            "policy": {"config": folder},
            "layout": layout,
            "precision": {"dtype": options.dtype},
            "batch": {"max_tokens": options.max_tokens},
            "optimizer": {"lr": 1e-5},
        }
    )


def sequences(options: argparse.Namespace) -> list[Sequence]:
    """Responses of three quarters of the length, all of whose tokens count."""
    generator = np.random.default_rng(0)
    mask = np.arange(options.length) >= options.length // 4
    return [
        Sequence(
            index, generator.integers(0, options.vocab, options.length), mask, scalars={"advantage": float(index % 2) - 0.5}
        )
        for index in range(options.sequences)
    ]


def bare_step(policy: Policy, batches: list[PackTensors]) -> None:
    """Megatron's own training step on the same chunks and tokens."""
    chunks = list(policy.model.chunks)
    iterators: list[Iterator[PackTensors]] = [iter(batches) for _ in chunks]
    scale = 1.0 / sum(batch.tokens.numel() for batch in batches)

    def loss(batch: PackTensors, output: torch.Tensor) -> tuple[Any, ...]:
        total = torch.where(batch.mask, output.float().view(-1), 0.0).sum() * scale
        return total, torch.zeros((), dtype=torch.int), total.detach()

    def forward_step(iterator: Iterator[PackTensors], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        labels = batch.labels.clamp(min=0)[None]
        return chunk(batch.tokens, batch.positions, None, labels=labels, packed_seq_params=batch.packed), partial(loss, batch)

    policy.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=max(batch.tokens.size(1) for batch in batches),
        micro_batch_size=1,
        forward_only=False,
    )
    policy.optimizer.chained.step()


class _CrossEntropyHead:
    """In place of the fused head: Megatron's logits and cross-entropy, to tell the head's cost from the policy's."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(
        self,
        *,
        hidden_states: Any,
        output_layer: Any,
        output_weight: Any,
        compute_language_model_loss: Any,
        context: Any,
        **_: Any,
    ) -> torch.Tensor:
        logits, _ = output_layer(hidden_states, weight=output_weight)
        loss: torch.Tensor = compute_language_model_loss(context.labels.clamp(min=0)[None], logits)
        return -loss.float().view(1, -1)


class _MeanLogProb:
    """The bare loss as an objective."""

    needs_entropy = False

    def __call__(self, batch: TokenBatch) -> ObjectiveResult:
        total = -batch.sum_sequences(batch.log_probs).sum() / batch.divisors.tokens
        return ObjectiveResult(total, {"loss": Mean(total.detach(), torch.ones(()))})


def measure(policy: Policy, work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each piece of work, taken in turns so that the machine's moods hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, call in work.items():
            policy.layout.barrier()
            start = time.perf_counter()
            call()
            policy.layout.barrier()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    options = arguments()
    launch = Launch.from_environment()
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy.open(settings(options, Path(folder)), launch)
    packs: list[Pack] = policy.pack(sequences(options))
    batches = [pack_tensors(pack, policy.layout) for pack in packs]
    scored = policy.log_probs(packs)
    old = {"old": [values.log_probs for values in scored]}
    fused, plain = policy.head, _CrossEntropyHead(policy)

    def update(head: Any, objective: Any, columns: Any) -> None:
        policy.head = head
        policy.update(packs, objective, columns)

    seconds = measure(
        policy,
        {
            "bare Megatron-core": partial(bare_step, policy, batches),
            "update, Megatron's cross-entropy": partial(update, plain, _MeanLogProb(), None),
            "update, fused head, GSPO": partial(update, fused, SequencePolicyLoss(), old),
        },
        options.rounds,
    )
    if policy.layout.is_main:
        tokens = options.sequences * options.length
        print(
            f"{tokens} tokens a step, {len(packs)} packs a rank, {launch.world_size} ranks, medians of {options.rounds} turns"
        )
        bare = seconds["bare Megatron-core"]
        for name, value in seconds.items():
            print(f"  {name:36s} {value:8.3f} s   {value / bare:5.3f} of bare")
    policy.close()


if __name__ == "__main__":
    main()

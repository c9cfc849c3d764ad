"""How fast weights reach a live SGLang server: each transport against the bare movement of the same bytes, in one run.

A policy of about 670 MB, with experts' matrices of 2 MB as larger models have them, publishes to a real server on this
machine, without the probe. Beside it, in turns:

    bare disk         the same tensors saved by the safetensors library as one new file in the same folder, and the server's
                      update from that folder; the two are shown apart as well
    bare broadcast    the same tensors broadcast to the server in one call of its update over a group that is there already;
                      and to a process that only receives, which shows what the server's own loading costs

A publish is all of look, plan, pause, gather, travel, the server's loading, version, continue, and parting.

It needs about 8 GB of memory, and two minutes.

    python tools/bench_publish.py
"""

import argparse
import asyncio
import multiprocessing
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_rl.train.upstream import quiet_upstream

quiet_upstream()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_rl.config.settings import Settings  # noqa: E402
from megatron_rl.policy.layout import Launch  # noqa: E402
from megatron_rl.policy.policy import Policy  # noqa: E402
from megatron_rl.rollout.client import Client  # noqa: E402
from megatron_rl.rollout.server import ServerOptions, free_ports, start_servers  # noqa: E402
from megatron_rl.train.publishing import open_publisher  # noqa: E402
from megatron_rl.weights.map import WeightMap  # noqa: E402
from megatron_rl.weights.publish.files import MEMORY, make_folder  # noqa: E402
from megatron_rl.weights.publish.groups import UpdateGroup  # noqa: E402
from megatron_rl.weights.publish.ports import Target  # noqa: E402
from megatron_rl.weights.publish.publisher import Publisher  # noqa: E402

TIMEOUT = timedelta(seconds=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="timed rounds, after one that is not")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="105 MB each")
    parser.add_argument("--bucket-mb", type=int, default=128, metavar="N", help="publish.bucket_bytes, in MB")
    parser.add_argument("--tensor", action="store_true", help="the transport `tensor` too, which takes seconds")
    return parser.parse_args()


def write_model(folder: Path, layers: int) -> dict[str, Tensor]:
    """A Qwen3-MoE checkpoint of random weights, without a tokenizer. Returns its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def receive(port: int, shapes: list[tuple[int, ...]], rounds: int) -> None:
    """The other end of a bare broadcast."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, False, TIMEOUT)
    group: Any = dist.ProcessGroupGloo(store, 1, 2, TIMEOUT)
    tensors = [torch.empty(shape) for shape in shapes]
    for _ in range(rounds):
        broadcast(group, tensors)
        group.barrier().wait()


def broadcast(group: Any, tensors: list[Tensor]) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    for work in [group.broadcast([tensor], options) for tensor in tensors]:
        work.wait()


class Bench:
    """The pieces of work that are timed against one another."""

    def __init__(self, options: argparse.Namespace, url: str, model: Path, file: Path, tensors: dict[str, Tensor]) -> None:
        self.options, self.url, self.tensors = options, url, tensors
        self.policy = Policy.open(self._settings(model), Launch())
        self.vocabulary = self.policy.architecture.vocab
        self.version = 0
        self.file = file
        port = free_ports(1)[0]
        names = WeightMap(self.policy.architecture).hf
        self.names = list(names)
        self.flat = [tensors[name].contiguous() for name in names]
        self.publishers = {transport: self._publisher(transport) for transport in ("disk", "broadcast", "tensor")}
        self.paused: dict[str, list[float]] = defaultdict(list)
        shapes = [tuple(tensor.shape) for tensor in self.flat]
        context = multiprocessing.get_context("spawn")
        self.receiver = context.Process(target=receive, args=(port, shapes, options.rounds + 1), daemon=True)
        self.receiver.start()
        self.group: Any = dist.ProcessGroupGloo(dist.TCPStore("127.0.0.1", port, 2, True, TIMEOUT), 0, 2, TIMEOUT)

    def _settings(self, model: Path) -> Settings:
        return Settings.model_validate({"policy": {"init": model}, "precision": {"dtype": "float32"}})

    async def bare_broadcast(self) -> None:
        broadcast(self.group, self.flat)
        self.group.barrier().wait()

    async def server_broadcast(self) -> None:
        names = list(self.names)
        shapes = [list(tensor.shape) for tensor in self.flat]
        group, formats = self.server_group, ["float32"] * len(names)
        call = self.client.update_from_distributed(names, formats, shapes, group.name, self.version)
        await asyncio.gather(call, group.broadcast(self.flat))

    async def bare_write(self) -> None:
        path = self.file / "model.safetensors"
        path.unlink(missing_ok=True)
        save_file(self.tensors, path)

    async def server_load(self) -> None:
        await self.client.update_from_disk(str(self.file), self.version)

    async def bare_disk(self) -> None:
        await self.bare_write()
        await self.server_load()

    async def publish(self, transport: str) -> None:
        self.version += 1
        report = await self.publishers[transport].publish(self.version, [Target(self.url)])
        assert report.serving == (self.url,), report.failures
        self.paused[transport].append(report.outcomes[0].paused)

    def _publisher(self, transport: str) -> Publisher:
        changes = {"transport": transport, "probe": False, "bucket_bytes": self.options.bucket_mb * 2**20}
        settings = self.policy.settings.publish.model_copy(update=changes)
        self.policy.settings = self.policy.settings.model_copy(update={"publish": settings})
        return open_publisher(self.policy, lambda url: nullcontext(self.client))  # as a pool of servers would have it

    async def work(self) -> dict[str, list[float]]:
        """Seconds of each in each turn, taken in turns so that the machine's moods hit all alike."""
        self.client = Client(self.url, self.vocabulary)
        self.server_group = await UpdateGroup.form(self.client, 1, torch.device("cpu"), 60)
        calls: dict[str, Callable[[], Awaitable[None]]] = {
            "  write alone": self.bare_write,
            "  load alone": self.server_load,
            "bare disk": self.bare_disk,
            "publish, disk": lambda: self.publish("disk"),
            "  to a bare process": self.bare_broadcast,
            "bare broadcast": self.server_broadcast,
            "publish, broadcast": lambda: self.publish("broadcast"),
        }
        if self.options.tensor:
            calls["publish, tensor"] = lambda: self.publish("tensor")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(self.options.rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                await call()
                if turn:
                    times[name].append(time.perf_counter() - start)
        await self.client.close()
        return times


@contextmanager
def memory_folder() -> Iterator[Path]:
    """In the memory file system, under a name by which the next publish on this machine removes what a kill -9 leaves."""
    folder = make_folder(MEMORY, version=0)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # as Ctrl-C does: nothing is left in memory
    with tempfile.TemporaryDirectory() as name, memory_folder() as file:
        folder = Path(name)
        tensors = write_model(folder / "model", options.layers)
        size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
        arguments_of_server = {"skip_tokenizer_init": True, "max_total_tokens": 4096}
        server_options = ServerOptions(folder / "model", folder / "server.log", arguments_of_server, device="cpu", threads=1)
        (server,) = asyncio.run(start_servers([server_options]))
        with server:
            bench = Bench(options, server.url, folder / "model", file, tensors)
            times = asyncio.run(bench.work())
            bench.policy.close()
    print(f"{size:.0f} MB in {len(tensors)} tensors, buckets of {options.bucket_mb} MB, medians of {options.rounds} turns")
    for name, values in times.items():
        value = statistics.median(values)
        print(f"  {name:20s} {value:7.3f} s  {size / value:7.0f} MB/s")
    for way in ("disk", "broadcast"):
        pairs = zip(times[f"bare {way}"], times[f"publish, {way}"], strict=True)  # one right after the other
        share, paused = statistics.median(bare / ours for bare, ours in pairs), statistics.median(bench.paused[way])
        print(f"  publish by {way}: {share:.0%} of the bare rate; the server did not generate for {paused:.3f} s")


if __name__ == "__main__":
    main()

"""The servers: what a GPU of one holds, how many tokens it can keep, and how long they take for a step's responses.

A decoding step takes the longer of what it reads (the weights that its requests meet, their keys and values) and what it
computes, with the collectives of tensor parallelism and a fixed cost a step and layer on top. Requests end one after the other:
after t tokens the share (1 - t/longest)^e is left (`Workload.decay`), and all have to end: the last ones run nearly alone.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.counting import Parameters, Shards, chunk_parameters
from megatron_rl.config.layout_map import padded_vocab
from megatron_rl.config.settings import Settings
from megatron_rl.config.sglang_arguments import value_of
from megatron_rl.plan.job import Job
from megatron_rl.plan.machine import GIB
from megatron_rl.plan.products import Cut, key_value_width, layer_products, pair_operations

COLOCATED_SHARE = 0.5  # of what the policy leaves free, where the settings say nothing (rollout.own_servers)
FP8_WEIGHT = 1 + 4 / 128**2  # bytes of a weight with its share of a block's scale
POINTS = 64  # at which the time of a response's course is looked at


@dataclass(frozen=True)
class Server:
    """One server as its arguments describe it."""

    tensor: int
    pipeline: int
    data: int  # attention's copies (enable_dp_attention), which share out requests
    weight_bytes: float  # of a quantised or plain weight of a layer
    key_bytes: int
    plain_bytes: int  # of what is never quantised

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline

    @property
    def attention_tensor(self) -> int:
        """Ranks that attention is cut over."""
        return self.tensor // self.data


@dataclass(frozen=True)
class ServerMemory:
    """Bytes of one GPU of a server, and what fits in them."""

    weights: int
    token: float  # keys and values of one token
    static: int  # for weights, keys and values
    capacity: int  # tokens that the whole server can keep

    @property
    def cache(self) -> int:
        return max(0, self.static - self.weights)


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of a step's responses on all servers."""

    servers: int
    requests: int  # of a server, a step
    concurrent: int  # at once, at most
    prefill: float
    decode: float
    tail: float  # of the decoding, with less than a tenth of the requests left
    tokens_per_gpu: float  # responses' tokens a second and GPU of the servers

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def server_of(settings: Settings, cpu: bool = False) -> Server:
    """From `sglang:`, with SGLang's defaults."""

    def whole(name: str) -> int:
        value = value_of(settings.sglang, name)
        return value if isinstance(value, int) and value > 0 else 1

    plain = 4 if cpu or value_of(settings.sglang, "dtype") in ("float32", "float") else 2
    tensor = whole("tp_size")
    attention_copies = whole("dp_size") if value_of(settings.sglang, "enable_dp_attention") else 1
    quantised = value_of(settings.sglang, "quantization") == "fp8" or _fp8_checkpoint(settings)
    keys = value_of(settings.sglang, "kv_cache_dtype")
    return Server(
        tensor=tensor,
        pipeline=whole("pp_size"),
        data=math.gcd(attention_copies, tensor),
        weight_bytes=FP8_WEIGHT if quantised else plain,
        key_bytes=1 if isinstance(keys, str) and keys.startswith("fp8") else plain,
        plain_bytes=plain,
    )


def _fp8_checkpoint(settings: Settings) -> bool:
    """Does the checkpoint that servers load say that it is quantised?"""
    folder = Path(settings.servers.model or settings.policy.init)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a hub name, or no checkpoint yet: unquantised
    quantised = config.get("quantization_config")
    return isinstance(quantised, dict) and quantised.get("quant_method") == "fp8"


@cache
def server_parameters(architecture: Architecture, server: Server) -> Parameters:
    """What one GPU of a server holds: a pipeline stage's layers (the longest stage's, with one end of the model)."""
    layers = range(math.ceil(architecture.layers / server.pipeline))
    rows = math.ceil(padded_vocab(architecture.vocab) / server.tensor)
    ends = server.pipeline == 1
    expert = math.gcd(server.tensor, architecture.experts.count) if architecture.experts else 1
    cut = Shards(server.tensor, expert, server.tensor // expert)  # experts are dealt to ranks, or cut in width: as many bytes
    whole = chunk_parameters(architecture, layers, cut, rows, first=True, last=ends)
    attention = chunk_parameters(architecture, layers, Shards(server.attention_tensor), rows, first=True, last=ends).attention
    copied = 0.0
    if architecture.latent_attention is None:  # key-value heads: at least one on each rank
        heads = architecture.kv_heads / server.attention_tensor
        copied = len(layers) * architecture.hidden * 2 * (max(heads, 1) - heads) * architecture.head_dim
    return replace(whole, attention=attention + round(copied))


def server_memory(job: Job, server: Server, free: float) -> ServerMemory:
    """Of a GPU whose servers find `free` bytes when they start."""
    held = server_parameters(job.architecture, server)
    plain = held.embedding + held.output + held.router + held.norms
    weights = round((held.total - plain) * server.weight_bytes + plain * server.plain_bytes)
    layers = math.ceil(job.architecture.layers / server.pipeline)
    token = key_value_width(job.architecture, server.attention_tensor) * layers * server.key_bytes
    share = value_of(job.settings.sglang, "mem_fraction_static")
    if not isinstance(share, float):
        share = COLOCATED_SHARE if job.settings.servers.colocated else job.machine.static_share
    static = round(free * share)
    capacity = int(max(0.0, static - weights) / token) * server.data
    most = value_of(job.settings.sglang, "max_total_tokens")
    return ServerMemory(weights, token, static, min(capacity, most) if isinstance(most, int) else capacity)


def free_for_servers(job: Job, policy: int) -> float:
    """Bytes that a server finds free on a GPU: all, or what the policy's `policy` bytes and the reserve leave."""
    memory = job.machine.memory_gib * GIB
    return job.machine.usable_bytes - policy if job.settings.servers.colocated else memory - 1.0 * GIB


def rollout_time(job: Job, server: Server, memory: ServerMemory, servers: int) -> RolloutTime:
    """Seconds until a step's last response has ended."""
    work = job.workload
    requests = math.ceil(work.sequences / servers)
    concurrent = max(1, min(requests, _most_requests(job, memory)))
    prefill = requests * work.prompt / work.group_size * prefill_seconds_per_token(job, server)
    first = (requests - concurrent) * work.response / concurrent * decode_seconds(job, server, concurrent, work.sequence)
    decode = tail = 0.0
    piece = work.longest / POINTS
    for point in range(POINTS):
        share = (1 - (point + 0.5) / POINTS) ** work.decay
        alive = max(1.0, concurrent * share)
        seconds = piece * decode_seconds(job, server, alive, work.prompt + (point + 0.5) * piece)
        decode += seconds
        tail += seconds if share < 0.1 else 0.0
    decode += first
    tokens = work.sequences * work.response
    rate = tokens / (prefill + decode) / (servers * server.gpus)
    return RolloutTime(servers, requests, concurrent, prefill, decode, tail, rate)


def _most_requests(job: Job, memory: ServerMemory) -> int:
    most = memory.capacity // job.workload.sequence
    limit = value_of(job.settings.sglang, "max_running_requests")
    asked = job.settings.servers.max_in_flight
    return int(min(most, *(number for number in (limit, asked) if isinstance(number, int)), 10**9))


def prefill_seconds_per_token(job: Job, server: Server) -> float:
    """The whole server's time for a token of a prompt, which a group's requests share: operations alone, as in training."""
    return _operations(job, job.workload.prompt / 2) / (_speed(job, server) * server.gpus)


def decode_seconds(job: Job, server: Server, requests: float, length: float) -> float:
    """Between two tokens of each of `requests` responses that are `length` tokens long by now."""
    machine, architecture = job.machine, job.architecture
    bandwidth = machine.memory_gb_s * 1e9 * machine.shares.decode
    held = server_parameters(architecture, server)
    experts = architecture.experts
    met = 1 - (1 - experts.top_k / experts.count) ** requests if experts else 0.0  # share of experts that some request chooses
    weights = (held.attention + held.dense + held.shared_experts + held.experts * met) * server.weight_bytes
    weights += (held.output + held.router + held.norms) * server.plain_bytes
    layers = math.ceil(architecture.layers / server.pipeline)
    keys = requests / server.data * length * key_value_width(architecture, server.attention_tensor) * layers * server.key_bytes
    computed = requests * _operations(job, length) / (_speed(job, server) * server.gpus)
    reading = (weights + keys) / bandwidth
    fixed = machine.costs.step_us * 1e-6 + architecture.layers * machine.costs.server_layer_us * 1e-6
    # Stages work one after the other on a token: each reads its own part.
    return max(reading * server.pipeline, computed) + fixed + _collectives(job, server, requests)


def _collectives(job: Job, server: Server, requests: float) -> float:
    """Two all-reduces a layer over tensor ranks. Where attention is copied instead, tokens go to their experts and back: there
    in the format of the weights."""
    if server.tensor == 1:
        return 0.0
    architecture = job.architecture
    speed, latency = job.machine.link(server.tensor)
    tokens = requests / server.data * architecture.hidden * (server.tensor - 1) / server.tensor
    if server.data > 1:
        copies = min(server.data, architecture.experts.top_k) if architecture.experts else 1
        return architecture.layers * (tokens * copies * (server.weight_bytes + server.plain_bytes) / speed + latency)
    return architecture.layers * 2 * (tokens * server.plain_bytes * 2 / speed + latency / 2)


def _operations(job: Job, length: float) -> float:
    """Of one token with `length` tokens before it, in the whole model."""
    architecture = job.architecture
    top_k = architecture.experts.top_k if architecture.experts else 0
    cut = Cut(tokens=1, local=1, routed=top_k, tensor=1, expert=1, expert_tensor=1)
    by_kind = {kind: sum(p.operations for p in layer_products(architecture, kind, cut)) for kind in set(job.kinds)}
    return (
        sum(by_kind[kind] for kind in job.kinds)
        + architecture.layers * length * pair_operations(architecture)
        + 2 * architecture.hidden * architecture.vocab
    )


def _speed(job: Job, server: Server) -> float:
    peaks, shares = job.machine.tflops, job.machine.shares
    if server.weight_bytes < 2 and peaks.fp8 is not None:
        return peaks.fp8 * 1e12 * shares.matmul_fp8
    return (peaks.bfloat16 if server.plain_bytes == 2 else peaks.float32) * 1e12 * shares.matmul

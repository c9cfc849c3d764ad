"""What ranks do in tests of weights: start from a checkpoint, compute, gather, export; and report what they saw."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.layout_map import rank_coordinates
from megatron_rl.config.settings import Settings
from megatron_rl.policy.checkpoint import CheckpointWriter
from megatron_rl.policy.hf_export import HfExporter
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.slices import model_slices
from megatron_rl.policy.state import save_policy
from megatron_rl.policy.verify_logits import policy_logits, random_tokens
from megatron_rl.weights.gather import buckets, gather, plan_gather
from megatron_rl.weights.hf_files import HfFolder
from megatron_rl.weights.load import load_hf
from megatron_rl.weights.map import WeightMap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Started:
    """What one rank saw of a policy that started from a Hugging Face folder."""

    differences: list[str]  # boxes that the weight map and the built model disagree about
    bytes_counted: int  # by the reader
    bytes_read: int  # by the kernel
    share: int  # bytes of the boxes that the rank holds, as they are stored
    logits: dict[int, Tensor]
    given_back: set[str]  # HF tensors that come from the ranks as the checkpoint holds them, bit by bit
    spoiled: set[str]  # the others


def start(launch: Launch, settings: dict[str, Any], stored_bytes: int) -> Started:
    """Start from a checkpoint, read it once more with the kernel's count, compute logits of random tokens, and give it back."""
    policy = Policy.open(Settings(**settings), launch)
    slices = list(model_slices(policy.model, policy.layout))
    before = _read_by_process()
    counted = load_hf(slices, policy.architecture, Path(settings["policy"]["init"]))
    read = _read_by_process() - before
    share = sum(piece.tensor.numel() for piece in slices) * stored_bytes
    logits = policy_logits(policy, random_tokens(policy.architecture.vocab))
    given_back, spoiled = _given_back(policy, launch, Path(settings["policy"]["init"]))
    return Started(_differences(policy), counted, read, share, logits, given_back, spoiled)


def _given_back(policy: Policy, launch: Launch, folder: Path) -> tuple[set[str], set[str]]:
    """Which HF tensors, dealt to the ranks in turn and put together from all, are and are not those of the checkpoint."""
    weight_map = WeightMap(policy.architecture)
    names, ranks = list(weight_map.hf), launch.world_size
    plan = plan_gather(weight_map, policy.settings.layout, ranks, [{rank: names[rank::ranks] for rank in range(ranks)}])
    (tensors,) = gather(plan, model_slices(policy.model, policy.layout), weight_map, torch.float32, torch.device("cpu"))
    with HfFolder(folder) as files:
        equal = {name for name, tensor in tensors.items() if torch.equal(tensor, files.read(name))}
    return equal, tensors.keys() - equal


def _read_by_process() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _differences(policy: Policy) -> list[str]:
    layout, rank = policy.settings.layout, policy.layout.rank
    place = rank_coordinates(layout, policy.layout.world_size)[rank]
    held = WeightMap(policy.architecture).held(layout, place)
    planned = Counter((each.rule.megatron, each.rule.shape, each.box, each.keeper) for each in held)
    built = Counter(
        (piece.name, tuple(piece.shape), (tuple(piece.offset), tuple(piece.size)), piece.saved_here)
        for piece in model_slices(policy.model, policy.layout)
    )
    return [
        f"rank {rank}, {side}: {each}" for side, more in (("map", planned - built), ("model", built - planned)) for each in more
    ]


def gather_and_export(
    launch: Launch,
    settings: dict[str, Any],
    bucket: int,
    targets: list[list[int]],
    folder: Path,
    formats: list[str],
    shard_size: int,
) -> list[tuple[dict[str, Tensor], int]]:
    """Assemble all HF tensors in buckets dealt to each choice of target ranks; then save a checkpoint and export.

    Returns for each choice this rank's tensors, and the most numbers that it got in a round.
    """
    policy = Policy.open(Settings(**settings), launch)
    weight_map = WeightMap(policy.architecture)
    cut = buckets(weight_map, weight_map.hf, bucket)
    results = []
    for chosen in targets:
        rounds = [dict(zip(chosen, cut[start:], strict=False)) for start in range(0, len(cut), len(chosen))]
        rounds.append({target: cut[0] for target in chosen})  # several ranks may want the same
        plan = plan_gather(weight_map, policy.settings.layout, launch.world_size, rounds)
        dtype = DTYPES[policy.settings.precision.dtype]
        found: dict[str, Tensor] = {}
        most = 0
        for tensors in gather(plan, model_slices(policy.model, policy.layout), weight_map, dtype, torch.device("cpu")):
            most = max(most, sum(tensor.numel() for tensor in tensors.values()))
            assert all(name not in found or torch.equal(found[name], tensor) for name, tensor in tensors.items())
            found |= tensors
        results.append((found, most))
    save_policy(CheckpointWriter(folder, policy.layout, keep_last=1), policy)
    for format in formats:
        exporter = HfExporter(policy, format, shard_size=shard_size, bucket=bucket)  # type: ignore[arg-type]
        exporter.save(folder / format)
        exporter.save(folder / format)  # again, over what is there
    return results


def export_with_a_failure(launch: Launch, settings: dict[str, Any], folder: Path, rank: int) -> str:
    """One rank's weights are not finite; what every rank is told."""
    policy = Policy.open(Settings(**settings), launch)
    if launch.rank == rank:
        next(iter(policy.model.named_parameters()))[1].data.fill_(float("nan"))
    try:
        HfExporter(policy, "float32", shard_size=10**5).save(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "exported"

"""What ranks do in tests: train a policy for a few steps and report everything by global names."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import mappings
from numpy.typing import NDArray

from megatron_rl.config.errors import CheckpointError
from megatron_rl.config.settings import Settings
from megatron_rl.objectives.base import Objective
from megatron_rl.objectives.gspo import SequencePolicyLoss
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy import model
from megatron_rl.policy.checkpoint import CheckpointWriter
from megatron_rl.policy.device import adapt_to_cpu
from megatron_rl.policy.layout import Launch
from megatron_rl.policy.optimizer import ParameterState
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.slices import model_slices, optimizer_slices
from megatron_rl.policy.state import load_policy, save_policy
from megatron_rl.types import Sequence as TokenSequence
from megatron_rl.weights.boxes import Slice
from megatron_rl.weights.checkpoint_files import latest_checkpoint

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Trained:
    """What a run of a few steps saw, the same whatever the layout."""

    log_probs: dict[int, NDArray[np.float32]]  # before the first step, token-aligned
    entropy: dict[int, NDArray[np.float32]]
    losses: list[float]
    grad_norms: list[float]
    metrics: list[Mapping[str, float]]
    gradients: Arrays  # of the first step, before clipping
    weights: Arrays  # after the last step
    moments: Arrays


def gather(policy: Policy, slices: Iterator[Slice]) -> Arrays:
    """Global tensors from every rank's slices; boxes that several ranks hold must agree exactly."""
    mine = [(s.name, s.shape, s.offset, s.size, s.tensor.detach().float().reshape(s.size).numpy().copy()) for s in slices]
    everyone: list[Any] = [None] * policy.layout.world_size
    dist.all_gather_object(everyone, mine)
    arrays: Arrays = {}
    for rank_slices in everyone:
        for name, shape, offset, size, values in rank_slices:
            whole = arrays.setdefault(name, np.full(shape, np.nan, np.float32))
            box = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
            held = whole[box]
            known = ~np.isnan(held)
            np.testing.assert_array_equal(held[known], values[known], err_msg=f"ranks disagree about {name}")
            whole[box] = values
    for name, whole in arrays.items():
        assert not np.isnan(whole).any(), f"no rank holds all of {name}"
    return arrays


def main_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Megatron's own gradient buffer of a parameter."""
    return parameter.main_grad  # type: ignore[attr-defined]


def gradients(policy: Policy) -> Arrays:
    """The reduced gradient of every parameter, from the ranks that keep it."""
    parameters = dict(policy.model.named_parameters())

    def states() -> Iterator[ParameterState]:
        for state in policy.optimizer.states():
            grad = main_grad(parameters[state.name]).view(-1)[state.start : state.stop]
            yield ParameterState(state.name, state.start, state.stop, {"gradient": grad})

    return gather(policy, optimizer_slices(policy.model, states(), policy.layout))


def toy_sequences(seed: int, count: int, vocab: int, longest: int) -> list[TokenSequence]:
    """Sequences of very unequal lengths, with prompts of different lengths and an advantage each."""
    generator = np.random.default_rng(seed)
    sequences = []
    for index in range(count):
        length = int(generator.integers(3, longest + 1))
        prompt = int(generator.integers(1, length))
        mask = np.arange(length) >= prompt
        advantage = float(generator.normal())
        tokens = generator.integers(0, vocab, length)
        rollout = generator.normal(size=length).astype(np.float32)
        sequences.append(TokenSequence(index, tokens, mask, {"rollout": rollout}, {"advantage": advantage}))
    return sequences


def train(
    launch: Launch,
    settings: dict[str, Any],
    sequences: Sequence[TokenSequence],
    steps: int,
    objective: str,
    bucket_size: int | None = None,
) -> Trained | None:
    """Score, then take some steps on the same sequences. Returned on rank 0. `bucket_size` replaces Megatron's 40 million."""
    if bucket_size is not None:
        setattr(model, "DistributedDataParallelConfig", partial(DistributedDataParallelConfig, bucket_size=bucket_size))  # noqa: B010
    policy = Policy.open(Settings(**settings), launch)
    packs = policy.pack(sequences)
    scored = policy.log_probs(packs, entropy=True)
    log_probs = policy.per_sequence(packs, [values.log_probs for values in scored])
    entropy = policy.per_sequence(packs, [values.entropy for values in scored if values.entropy is not None])
    captured: list[Arrays] = []
    take_step = policy.optimizer.step

    def step(number: int, grad_norm: float) -> None:
        if not captured:
            captured.append(gradients(policy))
        take_step(number, grad_norm)

    policy.optimizer.step = step  # type: ignore[method-assign, assignment]
    losses: dict[str, Objective] = {"gspo": SequencePolicyLoss(clip_low=0.2, clip_high=0.2), "sft": SupervisedLoss()}
    old = {"old": [values.log_probs for values in scored]}
    reports = [policy.update(packs, losses[objective], old) for _ in range(steps)]
    policy.optimizer.gather_weights()
    setattr(model, "DistributedDataParallelConfig", DistributedDataParallelConfig)  # noqa: B010
    weights = gather(policy, model_slices(policy.model, policy.layout))
    moments = gather(policy, optimizer_slices(policy.model, policy.optimizer.states(), policy.layout))
    everyone: list[Any] = [None] * launch.world_size
    dist.all_gather_object(everyone, (log_probs, entropy))
    if launch.rank:
        return None
    return Trained(
        {index: array for parts, _ in everyone for index, array in parts.items()},
        {index: array for _, parts in everyone for index, array in parts.items()},
        [report.loss for report in reports],
        [report.grad_norm for report in reports],
        [report.metrics for report in reports],
        captured[0],
        weights,
        moments,
    )


def train_from(
    launch: Launch,
    settings: dict[str, Any],
    sequences: Sequence[TokenSequence],
    steps: int,
    root: Path,
    load: bool = False,
    save: bool = False,
    asynchronous: bool = False,
) -> Trained | None:
    """Steps on the same sequences, from the latest checkpoint under `root` if asked, saving one at the end if asked."""
    policy = Policy.open(Settings(**settings), launch)
    writer = CheckpointWriter(root, policy.layout, keep_last=2)
    if load:
        latest = latest_checkpoint(root)
        assert latest is not None
        load_policy(policy, latest)
    packs = policy.pack(sequences)
    reports = [policy.update(packs, SupervisedLoss()) for _ in range(steps)]
    policy.optimizer.gather_weights()
    weights = gather(policy, model_slices(policy.model, policy.layout))
    moments = gather(policy, optimizer_slices(policy.model, policy.optimizer.states(), policy.layout))
    if save:
        save_policy(writer, policy, asynchronous=asynchronous)
        if asynchronous:  # what is saved is the state at the call, whatever is trained meanwhile
            policy.update(packs, SupervisedLoss())
        writer.finish()
    losses, norms = [report.loss for report in reports], [report.grad_norm for report in reports]
    return Trained({}, {}, losses, norms, [], {}, weights, moments) if launch.rank == 0 else None


def die_while_saving(launch: Launch, settings: dict[str, Any], sequences: Sequence[TokenSequence], root: Path, at: str) -> None:
    """Load, step, and be killed with -9 at some instant of the save: when this rank's file is written, before the folder is
    renamed, while the folder of the same step is replaced, or while an old one is deleted."""
    policy = Policy.open(Settings(**settings), launch)
    latest = latest_checkpoint(root)
    assert latest is not None
    load_policy(policy, latest)
    if at != "replacing":
        policy.update(policy.pack(sequences), SupervisedLoss())
    writer = CheckpointWriter(root, policy.layout, keep_last=1)
    if at == "file written":
        save_policy(writer, policy, asynchronous=True)
        assert writer._saving is not None
        writer._saving.thread.join()
        policy.layout.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    rename, remove = Path.rename, shutil.rmtree

    def rename_or_die(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    def remove_half(path: Path, **options: Any) -> None:
        if path.exists() and path.suffix == ".deleted":
            next(path.glob("rank_*")).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        remove(path, **options)

    if at == "deleting":
        shutil.rmtree = remove_half  # type: ignore[assignment]
    else:
        Path.rename = rename_or_die  # type: ignore[method-assign, assignment]
    save_policy(writer, policy)


def fail_to_save(launch: Launch, settings: dict[str, Any], root: Path, rank: int) -> str:
    """One rank cannot write; what every rank is told."""
    policy = Policy.open(Settings(**settings), launch)
    if launch.rank == rank:
        root = root / "a_file" / "below"
        root.parent.write_text("not a folder")
    writer = CheckpointWriter(root, policy.layout, keep_last=1)
    try:
        save_policy(writer, policy)
    except CheckpointError as error:
        return str(error)
    return "saved"


def uneven_gather(launch: Launch, key: str) -> dict[str, Any]:
    """Gather parts of 1 and 2 rows, with the patch `key` and without it."""
    adaptation = adapt_to_cpu()
    part = torch.full((launch.rank + 1, 3), float(launch.rank + 1))

    def gathered() -> Any:
        return mappings._gather_along_first_dim(part, dist.group.WORLD, [1, 2]).tolist()

    result = {"with": gathered(), "without": None}
    with adaptation.without(key), contextlib.suppress(RuntimeError, ValueError):
        result["without"] = gathered()
    return result

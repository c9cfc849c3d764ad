"""Saving and loading a whole policy: weights, optimizer, schedule position, random state."""

import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_rl.config.errors import CheckpointError
from megatron_rl.policy.checkpoint import Checkpoint, CheckpointWriter
from megatron_rl.policy.device import Device
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.slices import model_slices, optimizer_slices
from megatron_rl.weights.boxes import Slice
from megatron_rl.weights.checkpoint_files import differences, versions

# Settings that a run's numbers depend on and that a checkpoint therefore must share, unless checkpoint.allow_changes names
# them. Left out on purpose: the layout, packing, recomputation, machine, folders and number of steps.
MUST_MATCH = ("policy.temperature", "moe", "precision", "optimizer", "data", "run.seed")
MAY_DIFFER = ("moe.dispatcher", "data.cache")
logger = logging.getLogger(__name__)


def state_slices(policy: Policy) -> Iterator[Slice]:
    """Everything that training changes, in place."""
    yield from model_slices(policy.model, policy.layout)
    yield from optimizer_slices(policy.model, policy.optimizer.states(), policy.layout)


def save_policy(
    writer: CheckpointWriter,
    policy: Policy,
    *,
    asynchronous: bool = False,
    step: int | None = None,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Save a checkpoint of the policy's present state, named by `step`, or else by its optimizer steps.

    `run` is what a run wants to find again beside it: small, of JSON's types.
    """
    policy.optimizer.gather_weights()
    settings = policy.settings.model_dump(mode="json")
    header = {
        "steps": policy.steps,
        "skipped": policy.skipped,
        "settings": settings,
        "architecture": asdict(policy.architecture),
        "world_size": policy.layout.world_size,
        "versions": versions(),
        "run": dict(run or {}),
    }
    slices = [*state_slices(policy), *_random_slices(policy)]
    return writer.save(policy.steps if step is None else step, slices, header, asynchronous=asynchronous)


def load_policy(policy: Policy, folder: Path, *, verify: bool = True) -> Mapping[str, Any]:
    """Set the policy to a checkpoint's state, saved under this layout or another; returns what was saved beside it.

    Random state returns only under the same layout: it belongs to ranks. With `verify`, checksums are checked first. Every
    rank must name the same checkpoint. A checkpoint of weights alone, which a conversion made, is that of step 0: the
    optimizer starts from the weights, and random generators go on as they are.
    """
    named = policy.layout.everyone_has(str(folder))
    if len(set(named)) > 1:
        raise CheckpointError(f"ranks would load different checkpoints: {', '.join(sorted(set(named)))}. Is the folder shared?")
    checkpoint = Checkpoint(folder)
    _require_same_run(policy, checkpoint)
    if verify:
        checkpoint.verify(policy.layout)
    weights_only = checkpoint.manifest.get("weights_only", False)
    checkpoint.fill(model_slices(policy.model, policy.layout) if weights_only else state_slices(policy), policy.layout)
    policy.steps = int(checkpoint.manifest["steps"])
    policy.skipped = int(checkpoint.manifest["skipped"])
    if weights_only:
        policy.optimizer.start_from_weights()
        return {}
    policy.optimizer.set_steps_taken(policy.steps)
    if _same_ranks(policy, checkpoint):
        states = _random_slices(policy)
        checkpoint.fill(states, policy.layout)
        _set_random_states(policy.layout.device, {piece.name: piece.tensor for piece in states})
    elif policy.layout.is_main:
        logger.warning("%s was saved under another layout: random generators start afresh", folder)
    run: Mapping[str, Any] = checkpoint.manifest.get("run", {})
    return run


def _same_ranks(policy: Policy, checkpoint: Checkpoint) -> bool:
    """Does each rank have the place that it had when the checkpoint was saved?"""
    sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    saved, now = checkpoint.manifest["settings"]["layout"], policy.settings.model_dump(mode="json")["layout"]
    same_sizes = all(saved[name] == now[name] for name in sizes)
    return same_sizes and checkpoint.manifest["world_size"] == policy.layout.world_size


def _require_same_run(policy: Policy, checkpoint: Checkpoint) -> None:
    shape = differences(checkpoint.manifest["architecture"], asdict(policy.architecture))
    problems = [f"architecture.{text}" for text in shape]
    allowed = (*MAY_DIFFER, *policy.settings.checkpoint.allow_changes)
    weights_only = checkpoint.manifest.get("weights_only", False)  # and so of no run
    saved, now = checkpoint.manifest.get("settings", {}), policy.settings.model_dump(mode="json")
    for name in () if weights_only else MUST_MATCH:
        section, _, field = name.partition(".")
        for text in differences(saved[section], now[section]):
            full = f"{section}.{text.split(':')[0]}"
            if (not field or full == name) and not any(full == given or full.startswith(f"{given}.") for given in allowed):
                problems.append(f"{section}.{text}")
    if problems:
        listing = "\n  ".join(problems)
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} is of another run than the settings describe:\n  {listing}\n"
            "Set them as they were, or name what is meant to change: checkpoint.allow_changes=[optimizer.lr]"
        )


# -- random state ------------------------------------------------------------------------------------------------------


def _random_states(device: Device) -> dict[str, torch.Tensor]:
    """All generators of this process, as bytes."""
    _, words, python_gauss = random.getstate()
    python = np.array([*words, np.nan if python_gauss is None else python_gauss])  # 32-bit words are exact in float64
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = np.concatenate([np.asarray(keys, np.float64), [position, has_gauss, gauss]])
    states = {
        "python": torch.from_numpy(python),
        "numpy": torch.from_numpy(numpy_state),
        "torch": torch.get_rng_state(),
        "device": device.random_state(),
    }
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return states


def _random_slices(policy: Policy) -> list[Slice]:
    rank = policy.layout.rank
    return [
        Slice(f"random.{rank}.{name}", tuple(state.shape), (0,) * state.dim(), tuple(state.shape), state, saved_here=True)
        for name, state in _random_states(policy.layout.device).items()
    ]


def _set_random_states(device: Device, states: dict[str, torch.Tensor]) -> None:
    named = {name.split(".", 2)[2]: state for name, state in states.items()}
    words = named["python"].numpy()
    random.setstate((3, tuple(int(word) for word in words[:-1]), None if np.isnan(words[-1]) else float(words[-1])))
    numpy_state = named["numpy"].numpy()
    np.random.set_state(
        ("MT19937", numpy_state[:-3].astype(np.uint32), int(numpy_state[-3]), int(numpy_state[-2]), float(numpy_state[-1]))
    )
    torch.set_rng_state(named["torch"])
    device.set_random_state(named["device"])
    tracker = get_cuda_rng_tracker()
    trackers = {name.removeprefix("tracker."): state for name, state in named.items() if name.startswith("tracker.")}
    tracker.set_states(trackers)

"""The adaptation to a machine without CUDA: what each patched name is for, shown by what breaks without it."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import DeviceSettings
from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy.device import CPU_PATCHES, CUDA_NAMES, adapt_to_cpu, open_device
from tests.parallel.cluster import Cluster
from tests.parallel.jobs import toy_sequences
from tests.policy.single import opened, tiny_settings

TRACKER = "megatron.core.tensor_parallel.random"
NO_DRIVER = (RuntimeError, AssertionError)  # torch's own words differ between its builds with and without CUDA


def train(folder: Path, **sections: Any) -> None:
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = None  # made once a process
    with opened(tiny_settings(folder, **sections)) as policy:
        policy.update(policy.pack(toy_sequences(0, 3, 120, 20)), SupervisedLoss())


def recompute_part(folder: Path) -> None:
    train(folder, recompute={"mode": "selective", "modules": ["moe_act"]})


def recompute_without_a_compiler(folder: Path) -> None:
    def no_compiler(**_: Any) -> None:
        raise RuntimeError("c++: not found")

    module = importlib.import_module(TRACKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_inline", no_compiler)
        patch.setattr(module, "_share_storage_ext", None)
        recompute_part(folder)


def receive_nothing(folder: Path) -> None:
    with opened(tiny_settings(folder)) as policy:
        communicator = P2PCommunicator(policy.layout.groups.pp, policy.model.config)
        communicator._communicate(
            tensor_send_next=None, tensor_send_prev=None, recv_prev=False, recv_next=False, tensor_shape=None
        )


def tracked_states(folder: Path) -> None:
    """Generators of different seeds differ, and using one leaves the others alone."""
    with opened(tiny_settings(folder)):
        tracker = get_cuda_rng_tracker()
        tracker.reset()
        before = torch.get_rng_state()
        tracker.add("one", 1)
        tracker.add("two", 2)
        if torch.equal(*(tracker.get_states()[name] for name in ("one", "two"))):
            raise RuntimeError("two seeds, one state")
        with tracker.fork("one"):
            torch.rand(1)
        if not torch.equal(torch.get_rng_state(), before):
            raise RuntimeError("a fork was not undone")


def split_sizes(_: Path) -> None:
    module = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    sizes = module.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    if not isinstance(sizes, np.ndarray):
        raise RuntimeError("torch.distributed takes no tensor for split sizes")


# What to run with a patch taken out, for every patch. Those of two ranks are shown in the test below.
SHOWN: dict[str, Callable[[Path], None]] = {
    "torch.cuda.current_device": train,
    "torch.cuda.synchronize": receive_nothing,
    "torch.cuda.Stream": train,
    "torch.cuda.current_stream": train,
    "torch.cuda.get_rng_state": train,
    "torch.cuda.manual_seed": tracked_states,
    f"{TRACKER}._get_cuda_rng_state": recompute_part,
    f"{TRACKER}._set_cuda_rng_state": tracked_states,
    f"{TRACKER}._get_share_storage": recompute_without_a_compiler,
    f"{TRACKER}:CheckpointWithoutOutput.__init__": recompute_part,
    "torch:Tensor.type": train,
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": split_sizes,
    CUDA_NAMES: train,
}
SHOWN_ON_RANKS = "megatron.core.tensor_parallel.mappings._gather_along_first_dim"


def test_every_patch_is_shown() -> None:
    assert {patch.key for patch in CPU_PATCHES} | {CUDA_NAMES} == SHOWN.keys() | {SHOWN_ON_RANKS}
    assert all(len(patch.why) > 20 for patch in CPU_PATCHES)


@pytest.mark.parametrize("key", SHOWN)
def test_it_breaks_without(key: str, tmp_path: Path) -> None:
    adaptation = adapt_to_cpu()
    SHOWN[key](tmp_path)
    with adaptation.without(key), pytest.raises((RuntimeError, AssertionError, TypeError, NameError)):
        SHOWN[key](tmp_path)
    SHOWN[key](tmp_path)  # and it is back


def test_gloo_refuses_uneven_parts(cluster: Cluster) -> None:
    for outcome in cluster.run("tests.parallel.jobs:uneven_gather", 2, key=SHOWN_ON_RANKS):
        assert outcome == {"with": [[1.0] * 3, [2.0] * 3, [2.0] * 3], "without": None}


def test_inert_when_taken_out() -> None:
    """Uninstalling gives back the originals, every one."""
    adaptation = adapt_to_cpu()
    adapted = {patch.key: getattr(patch.owner(), patch.name) for patch in CPU_PATCHES}
    adaptation.uninstall()
    try:
        for patch in CPU_PATCHES:
            assert getattr(patch.owner(), patch.name) is not adapted[patch.key], patch.key
        with pytest.raises(NO_DRIVER):
            torch.zeros(1, device="cuda")
    finally:
        adaptation.install()
    assert torch.zeros(1, device="cuda").device.type == "cpu"


def test_asking_for_cuda_without_one_says_what_to_do() -> None:
    with pytest.raises(SettingsError, match=r"device\.kind=cuda.*setup\.sh --gpu"):
        open_device(DeviceSettings(kind="cuda"))


def test_threads_are_shared_out() -> None:
    before = torch.get_num_threads()
    try:
        open_device(DeviceSettings(threads=3))
        assert torch.get_num_threads() == 3
        open_device(DeviceSettings(), local_rank=0, local_ranks=10**6)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)

"""Real ranks for tests, started once: a few processes that join as many-rank groups as a test asks for.

Starting a rank costs ten seconds and more of imports. One process makes them, once, and is forked for each rank, also when a
test has killed some; so a test here costs only its own work. Ranks talk over gloo, as on any machine without a GPU. A job is a
function of this package that every rank calls with its `Launch`.
"""

import gc
import importlib
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RANKS = 4
IMPORTED = ("megatron_rl.policy.policy", "megatron_rl.policy.state", "megatron_rl.weights.publish.publisher")
GLANCE = 2.0  # seconds in which a death is noticed that another rank has failed of
JOB_TIMEOUT = 300  # seconds; a job that hangs in a collective is a failed job


def _serve(rank: int, pipe: Connection) -> None:
    """One rank: take jobs until the pipe closes."""
    import torch
    import torch.distributed as dist

    from megatron_rl.policy.layout import Launch

    warnings.simplefilter("ignore")  # upstream's, at every import of every rank
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    while True:
        try:
            name, world_size, store, arguments = pipe.recv()
        except EOFError:
            return
        try:
            module, _, function = name.partition(":")
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            launch = Launch(rank, world_size, rank, world_size)
            result = getattr(importlib.import_module(module), function)(launch, **arguments)
            _forget_groups()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _forget_groups() -> None:
    """Leave the groups and whatever still holds them: each keeps threads of gloo's alive, hundreds a job."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    for wrapped in [each for each in gc.get_objects() if isinstance(each, DistributedDataParallel)]:
        wrapped.__dict__.clear()  # autograd's hooks hold it, it holds the model, the model holds autograd's graph
    parallel_state.destroy_model_parallel()
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()  # keyed by the module, which knows its group
    gc.collect()
    dist.destroy_process_group()


def _dead_among(waiting: Mapping[Any, int]) -> str:
    """Who has died, of those that have not answered: a rank fails at once when one that it waits for is gone."""
    for pipe in wait(list(waiting), timeout=GLANCE):
        assert isinstance(pipe, Connection)
        try:
            pipe.recv()
        except EOFError:
            return f"rank {waiting[pipe]} died, and "
    return ""


class Cluster:
    """The processes. `run` gives a job to the first `world_size` of them and returns what each rank returned."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="megatron_rl_cluster_"))
        self._jobs = 0
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, job: str, world_size: int, **arguments: Any) -> list[Any]:
        if not self._ranks:
            self._start()
        self._jobs += 1
        store = self._folder / f"store_{self._jobs}"
        for _, pipe in self._ranks[:world_size]:
            pipe.send((job, world_size, store, arguments))
        try:
            return self._collect(world_size)
        except BaseException:
            self.stop()  # other ranks may wait for one that failed
            raise

    def _collect(self, world_size: int) -> list[Any]:
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:world_size])}
        results: dict[int, Any] = {}
        deadline = time.monotonic() + JOB_TIMEOUT
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer within {JOB_TIMEOUT} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    succeeded, value = pipe.recv()
                except EOFError as error:
                    raise RuntimeError(f"rank {rank} died") from error
                if not succeeded:
                    raise RuntimeError(f"{_dead_among(waiting)}rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED])
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read by the children's libraries when they load
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads

    def stop(self) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            process.terminate()
            process.join()
        self._ranks = []

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

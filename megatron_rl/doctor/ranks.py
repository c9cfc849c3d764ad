"""All ranks together: what each machine's doctor has found, how fast the groups of the intended layout are, and whether the
machines share a folder, its locks and the time.

Under a launcher these are the launcher's ranks. Without one, two are started on this machine if the settings ask for several.
"""

import json
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rl.config.load import dump_settings
from megatron_rl.config.settings import LayoutSettings, Settings
from megatron_rl.doctor import nvidia
from megatron_rl.doctor.apart import Ended, run_apart
from megatron_rl.doctor.finding import Finding, error, well
from megatron_rl.doctor.folder import nearest
from megatron_rl.doctor.visit import Visit
from megatron_rl.train.ranks import free_port

JOB = "megatron_rl.doctor.ranks_job"
TRIAL = 2  # ranks that are started where nobody launched any
AXES = ("tensor", "expert", "context", "pipeline")
FIX = (
    "Ranks must reach each other: the same MASTER_ADDR and MASTER_PORT everywhere, no firewall between machines, "
    "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME naming the right interface; NCCL_DEBUG=INFO tells more."
)


def check_ranks(visit: Visit) -> Iterator[Finding]:
    """Without a launcher. What `meet` does with one is more."""
    size = visit.settings.world_size if visit.settings is not None else None
    gpus = len(nvidia.gpus())
    if size is None or size == 1:
        yield well("one rank needs no collectives", visit.named)
    elif gpus == 1:
        yield well("collectives are not tried: two ranks cannot share a GPU. Launch the doctor with torchrun", visit.named)
    else:
        assert visit.settings is not None
        yield from _started_here(visit, visit.settings)


def _started_here(visit: Visit, settings: Settings) -> Iterator[Finding]:
    shared = {"WORLD_SIZE": TRIAL, "LOCAL_WORLD_SIZE": TRIAL, "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    environment = {**visit.environment, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in shared.items()}}
    ranks = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(TRIAL)]
    small = settings.model_copy(update={"layout": shrunk(settings.layout)})
    ended = _run(visit, small, ranks, [])
    if all(each.well for each in ended):
        yield from found_by(ended[0])
    else:
        worst = next(each for each in ended if not each.well)
        yield error(f"{TRIAL} ranks of this machine cannot work together: {worst.how}", JOB, FIX)


def meet(visit: Visit, own: Sequence[Finding]) -> tuple[list[Finding], bool]:
    """Every launched rank calls it with what it has found. On the main rank what all have found, elsewhere nothing more.

    Where the ranks could not meet, each has its own, with the reason, and False.
    """
    (ended,) = _run(visit, visit.settings, [visit.environment], own)
    if ended.well:
        return list(found_by(ended)), True
    place = visit.place
    failed = error(f"rank {place.rank} of {place.world_size} could not work with the others: {ended.how}", JOB, FIX)
    return [*own, replace(failed, check="ranks", host=socket.gethostname(), rank=place.rank)], False


def _run(visit: Visit, settings: Settings | None, ranks: Sequence[Mapping[str, str]], own: Sequence[Finding]) -> list[Ended]:
    with tempfile.TemporaryDirectory(prefix="megatron-rl-doctor-") as name:
        told = Path(name) / "own.json"
        told.write_text(json.dumps([finding.to_json() for finding in own]), encoding="utf-8")
        arguments = [str(told), str(nearest(visit.folder))]
        if settings is not None:
            path = Path(name) / "settings.yaml"
            path.write_text(dump_settings(settings), encoding="utf-8")
            arguments.append(str(path))
        return run_apart(JOB, arguments, ranks, visit.seconds)


def found_by(ended: Ended) -> Iterator[Finding]:
    yield from (Finding(**line) for line in ended.lines)


def shrunk(layout: LayoutSettings) -> LayoutSettings:
    """The first axis that the layout has, for two ranks; data, where it has none."""
    axis = next((name for name in AXES if getattr(layout, name) > 1), None)
    return LayoutSettings(**({axis: TRIAL} if axis is not None else {}))

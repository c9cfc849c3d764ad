"""The machine's GPUs: whether there are as many as the run wants, all alike, whole, free, and close to each other."""

from collections import Counter
from collections.abc import Iterator

from megatron_rl.doctor import nvidia
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit

WHERE = "nvidia-smi"
BUSY = 0.05  # share of a GPU's memory that somebody else may hold before it matters
FAR = ("PHB", "NODE", "SYS")  # through the processor: a tenth of NVLink's speed


def check_gpus(visit: Visit) -> Iterator[Finding]:
    """With nvidia-smi alone."""
    try:
        found = nvidia.read_gpus()
    except nvidia.DriverFault as fault:
        yield error(
            str(fault), WHERE, "Load the driver that fits (a restart after its update), or start the container with the GPUs."
        )
        return
    if not found:
        yield from _none(visit)
        return
    kinds = Counter((gpu.name, gpu.total) for gpu in found)
    named = ", ".join(f"{count} × {name} of {total / 1024:.0f} GiB" for (name, total), count in kinds.items())
    yield well(f"{named}, driver {found[0].driver}", WHERE, gpus=len(found), mebibytes=min(gpu.total for gpu in found))
    yield from _wanted(visit, found)
    if len(kinds) > 1:
        yield warning(
            "the GPUs are not alike: all will wait for the slowest", WHERE, "Leave some out with CUDA_VISIBLE_DEVICES."
        )
    for gpu in found:
        if gpu.faults:
            yield error(
                f"GPU {gpu.index} has had {gpu.faults} memory errors that could not be corrected",
                f"{WHERE} -i {gpu.index}",
                "Reset or replace it, and leave it out until then (CUDA_VISIBLE_DEVICES).",
            )
    yield from _somebody_else(found)
    yield from _topology(visit)


def _none(visit: Visit) -> Iterator[Finding]:
    settings = visit.settings
    if settings is not None and settings.device.kind == "cuda":
        yield error("device.kind = cuda, and there is no GPU here", visit.named, "Run where GPUs are, or set device.kind=auto.")
    elif settings is not None and settings.cluster.gpu is not None and settings.cluster.gpu != "cpu":
        yield error(
            f"cluster.gpu = {settings.cluster.gpu}, and there is no GPU here",
            visit.named,
            "Run the doctor on a machine of the cluster (srun, torchrun).",
        )
    else:
        yield well("there are no GPUs: everything runs on the CPU, really and slowly", "this machine", gpus=0)


def _wanted(visit: Visit, found: list[nvidia.Gpu]) -> Iterator[Finding]:
    visible = visit.environment.get("CUDA_VISIBLE_DEVICES")
    seen = len(found) if visible is None else len([name for name in visible.split(",") if name.strip()])
    if seen < visit.ranks_here:
        yield error(
            f"{visit.ranks_here} ranks are wanted on this machine, and it has {seen} GPUs"
            + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"),
            WHERE,
            "Start one rank a GPU: set cluster.gpus_per_node, or torchrun --nproc-per-node.",
        )


def _somebody_else(found: list[nvidia.Gpu]) -> Iterator[Finding]:
    using = nvidia.others()
    if using:
        yield warning(
            f"{len(using)} programs use GPUs here: {'; '.join(using[:4])}",
            WHERE,
            "End them, or ask for machines of your own (sbatch --exclusive).",
        )
        return
    for gpu in found:
        if gpu.used > BUSY * gpu.total:
            yield warning(
                f"{gpu.used} MiB of GPU {gpu.index} are held by a program that is not seen from here",
                f"{WHERE} -i {gpu.index}",
                "Look from outside the container; a process that was killed may still hold them.",
            )


def _topology(visit: Visit) -> Iterator[Finding]:
    links = nvidia.links()
    if not links:
        return
    kinds = Counter(links.values())
    told = ", ".join(f"{count} pairs {kind}" for kind, count in kinds.most_common())
    tensor = 1 if visit.settings is None else visit.settings.layout.tensor
    far = [pair for pair, kind in links.items() if kind in FAR]
    inside = [(i, j) for i, j in far if tensor > 1 and i // tensor == j // tensor]
    if inside:
        i, j = inside[0]
        yield warning(
            f"GPUs {i} and {j} of one tensor-parallel group are connected through the processor ({links[i, j]})",
            f"{WHERE} topo -m",
            "Make layout.tensor smaller, or put connected GPUs side by side with CUDA_VISIBLE_DEVICES.",
        )
    else:
        yield well(f"GPUs are connected: {told}", f"{WHERE} topo -m")

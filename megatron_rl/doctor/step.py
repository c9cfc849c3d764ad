"""One tiny step from end to end: a toy policy of this program's own, on this machine's device, learns from made-up samples."""

from collections.abc import Iterator

from megatron_rl.doctor.apart import run_apart
from megatron_rl.doctor.finding import Finding, error, well
from megatron_rl.doctor.visit import Visit

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIX = "Mend what the other checks say first. If they say nothing: megatron-rl doctor --only step --json holds its last words."


def check_step(visit: Visit) -> Iterator[Finding]:
    """In a process of its own, as the only rank."""
    environment = {name: value for name, value in visit.environment.items() if name not in LAUNCHER}
    environment.setdefault("OMP_NUM_THREADS", "1")
    (ended,) = run_apart("megatron_rl.doctor.step_job", [], [environment], visit.seconds)
    if not ended.lines or not ended.well:
        last = ended.lines[-1]["doing"] if ended.lines else "to load torch and Megatron-core"
        yield error(f"a toy policy cannot learn here: it began {last}, and {ended.how}", "megatron_rl.doctor.step_job", FIX)
        return
    facts = ended.lines[-1]
    told = f"loss {facts['loss']:.3g}, gradient {facts['gradient']:.3g}, log-probabilities moved by {facts['moved']:.2g}"
    if not facts["learned"]:
        yield error(f"a toy policy has taken a step on {facts['device']} and not learned: {told}", facts["device"], FIX)
        return
    took, start = facts["seconds"], ended.seconds - facts["seconds"]
    yield well(
        f"a toy policy has learned on {facts['device']}: {told}; {took:.2f} s for it, {start:.0f} s to start",
        facts["device"],
        seconds=took,
        start=start,
    )

"""Whether programs that a model writes can be held here: by trying to break out (`rewards/sandbox/probe.py`)."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.visit import Visit
from megatron_rl.rewards.sandbox.probe import ESSENTIAL, stand
from megatron_rl.rewards.sandbox.runner import SandboxError

SWITCHES = ("kernel/unprivileged_userns_clone", "kernel/apparmor_restrict_unprivileged_userns", "user/max_user_namespaces")
FIX = (
    "Allow user namespaces, seccomp and Landlock to this container, or run it as root with SYS_ADMIN; "
    "`megatron-rl rewards --check` tells what did not hold."
)


def check_sandbox(visit: Visit) -> Iterator[Finding]:
    """An error where the settings have a reward that runs programs, else a warning."""
    wanted = visit.settings is not None and any(part.name == "code" for part in visit.settings.rewards)
    complain = error if wanted else warning
    switches = ", ".join(
        f"{name} = {path.read_text().strip()}" for name in SWITCHES if (path := Path("/proc/sys") / name).exists()
    )
    try:
        standing = asyncio.run(stand())
    except SandboxError as fault:
        yield complain(f"no program can be held here: {str(fault).splitlines()[0]}", switches, FIX)
        return
    missing = [limit for limit in ESSENTIAL if limit not in standing.held]
    if missing:
        yield complain(f"programs of a model cannot be held here: {', '.join(missing)}", switches, FIX)
    else:
        yield well(f"programs of a model can be held here: {standing.walls}", switches)

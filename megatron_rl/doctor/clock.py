"""Clocks: the file system's against this machine's. Between machines the ranks compare theirs, under a launcher."""

import time
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.folder import nearest, trial_folder, unwritable
from megatron_rl.doctor.visit import Visit

NOTICEABLE, WRONG = 1.0, 60.0  # seconds
FIX = "Have both set by the same time server (chronyc tracking, timedatectl), then start again."


def check_clock(visit: Visit) -> Iterator[Finding]:
    """A file that is written now was written now."""
    place = nearest(visit.folder)
    refusal = unwritable(place, "its clock cannot be read")
    if refusal is not None:
        yield refusal
        return
    with trial_folder(visit) as trial:
        path = trial / "now"
        path.write_bytes(b"now")
        yield judge(age(path), f"the clock of {place}", str(place))


def age(path: Path) -> float:
    """Seconds since a file was written, by this machine's clock; less than none if it comes out of the future."""
    return time.time() - path.stat().st_mtime


def judge(difference: float, whose: str, where: str) -> Finding:
    """Of so many seconds by which another clock is behind ours."""
    told = f"{whose} is {abs(difference):.1f} s {'behind' if difference > 0 else 'ahead of'} this machine's"
    if abs(difference) > WRONG:
        return error(told, where, FIX, seconds=difference)
    if abs(difference) > NOTICEABLE:
        return warning(told, where, FIX, seconds=difference)
    return well(f"{whose} goes with this machine's", where, seconds=difference)

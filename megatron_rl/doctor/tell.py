"""The verdict in JSON, for schedulers. docs/doctor.md describes it; a change that could break a reader raises `SCHEMA`."""

import socket
import time
from typing import Any

from megatron_rl import __version__
from megatron_rl.doctor.examine import Examined
from megatron_rl.doctor.finding import LEVELS, worst
from megatron_rl.doctor.visit import Visit

SCHEMA = 1


def as_json(visit: Visit, examined: Examined) -> dict[str, Any]:
    """Plain values alone."""
    findings = examined.findings
    return {
        "schema": SCHEMA,
        "program": f"megatron-rl {__version__}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "ranks": visit.place.world_size,
        "settings": visit.named,
        "verdict": worst(findings),
        "counts": {level: sum(finding.level == level for finding in findings) for level in LEVELS},
        "seconds": {name: round(seconds, 3) for name, seconds in examined.seconds.items()},
        "findings": [finding.to_json() for finding in findings],
    }

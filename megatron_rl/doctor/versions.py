"""Installed versions against the pins: the requirements that megatron-rl itself is installed with."""

import platform
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import megatron_rl
from megatron_rl.doctor.finding import Finding, error, warning, well
from megatron_rl.doctor.nvidia import gpus
from megatron_rl.doctor.visit import Visit

NAME = "megatron-rl"
SOURCE = Path(megatron_rl.__file__).parent.parent / "pyproject.toml"  # where the package runs from its sources


def check_versions(visit: Visit) -> Iterator[Finding]:
    """Every requirement, and with GPUs those of the extra `gpu`."""
    pins = _pins()
    if pins is None:
        yield error(
            f"{NAME} is not installed as a package, so what it needs is not known", "", "Install it: launch/setup.sh [--gpu]."
        )
        return
    python, lines, where = pins
    if not python.contains(platform.python_version()):
        yield error(
            f"Python is {platform.python_version()}, wanted is {python}", where, "Make the environment anew: launch/setup.sh."
        )
    with_gpu = bool(gpus())
    wanted = [requirement for line in lines if _counts(requirement := Requirement(line), with_gpu)]
    found = [finding for requirement in wanted for finding in _look_at(requirement, with_gpu)]
    yield from found
    if all(finding.level != "error" for finding in found):
        yield well(f"{len(wanted)} requirements and Python {platform.python_version()} are as pinned", where)


def _pins() -> tuple[SpecifierSet, list[str], str] | None:
    """For which Python, what, and where it says so."""
    try:
        about = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        if not SOURCE.is_file():
            return None
        project = tomllib.loads(SOURCE.read_text(encoding="utf-8"))["project"]
        extra = [_of_extra(line) for line in project["optional-dependencies"]["gpu"]]
        return SpecifierSet(project["requires-python"]), [*project["dependencies"], *extra], str(SOURCE)
    python = SpecifierSet(about.metadata.get("Requires-Python", ""))
    return python, about.requires or [], f"metadata of {NAME} {about.version}"


def _of_extra(line: str) -> str:
    return f'{line}; extra == "gpu"'


def _counts(requirement: Requirement, with_gpu: bool) -> bool:
    """What the extra `gpu` names is wanted where there are GPUs, and must fit where it is installed."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return True
    of_gpu = marker.evaluate({"extra": "gpu"})
    return of_gpu and (with_gpu or any(metadata.distributions(name=requirement.name)))


def _look_at(requirement: Requirement, with_gpu: bool) -> Iterator[Finding]:
    setup = f"launch/setup.sh{' --gpu' if with_gpu else ''}"
    fix = f"Install what fits together: {setup}, or pip install '{requirement.name}{requirement.specifier}'."
    copies = [(copy.version, str(copy.locate_file(""))) for copy in metadata.distributions(name=requirement.name)]
    copies = list(dict.fromkeys(copies))
    if not copies:
        yield error(f"{requirement.name} is not installed, wanted is {requirement.specifier}", "", fix)
        return
    (version, place), *others = copies
    if not requirement.specifier.contains(Version(version), prereleases=True):
        yield error(f"{requirement.name} is {version}, wanted is {requirement.specifier}", place, fix)
    hidden = [f"{other} in {where}" for other, where in others if other != version]
    if hidden:
        yield warning(
            f"{requirement.name} is installed more than once: {version} hides {', '.join(hidden)}",
            place,
            "Remove the copy that is not wanted; PYTHONPATH and the user's own site-packages come before the environment's.",
        )

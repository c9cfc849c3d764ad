"""The rules of the house that a machine can check: who may import whom, how long things are, what the locks hold."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_rl"
LOCKS = sorted((ROOT / "launch/lock").glob("*.lock"))
SOURCES = sorted(path for room in ("megatron_rl", "tests", "tools") for path in (ROOT / room).rglob("*.py"))
ROOMS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - {"__init__"})

LONGEST_FILE = 400
LONGEST_FUNCTION = 60

# Rooms by height: a room imports from lower ones and from itself.
HEIGHT = {
    "types": 0,
    "config": 0,
    "objectives": 1,
    "data": 1,
    "plan": 1,
    "launch": 1,
    "rewards": 1,
    "weights": 1,
    "policy": 2,
    "rollout": 2,
    "observe": 3,
    "train": 4,
    "doctor": 5,
    "fidelity": 5,
    "cli": 6,
}

# Of the rooms below it, observe looks at files alone: the bank's, for the samples of a report, and the tokenizer's, for their
# texts. It neither computes nor speaks to servers.
SEEN_BY_OBSERVE = ("types", "config", "rollout.bank", "data.tokenizer", "observe")

# Heavy packages, and the only places that may import them, as prefixes of a path below megatron_rl/.
DOORS = {
    "megatron": ("policy/", "weights/"),
    "transformer_engine": ("policy/", "weights/"),
    "sglang": ("rollout/", "weights/publish"),
    "torch": ("objectives/", "policy/", "weights/", "rollout/", "train/", "doctor/", "fidelity/"),
}


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno} imports relatively; name the module in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def locked(path: Path) -> dict[str, Version]:
    """Package versions of a lock file."""
    return {
        canonicalize_name(name): Version(version) for name, version in re.findall(r"^(\S+?)==(\S+)", path.read_text(), re.M)
    }


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_holds_names_versions_and_hashes_alone(path: Path) -> None:
    entries = re.split(r"\n(?=\S)", path.read_text().rstrip("\n"))
    hash_lines = r"( \\\n    --hash=sha256:[0-9a-f]{64})+"
    wrong = [entry for entry in entries if not re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.+!_-]+" + hash_lines, entry)]
    assert not wrong


@pytest.mark.parametrize(("lock", "extras"), [("cpu", ["dev"]), ("gpu", ["dev", "gpu"])])
def test_the_lock_satisfies_pyproject(lock: str, extras: list[str]) -> None:
    versions = locked(ROOT / f"launch/lock/{lock}.lock")
    wrong = [
        str(asked) for asked in requirements(*extras) if not asked.specifier.contains(versions[canonicalize_name(asked.name)])
    ]
    assert not wrong


def test_what_runs_without_a_gpu_is_what_runs_with_one() -> None:
    lean, full = (locked(ROOT / f"launch/lock/{kind}.lock") for kind in ("cpu", "gpu"))
    assert lean.items() <= full.items()


def test_every_room_has_its_height() -> None:
    assert set(ROOMS) <= set(HEIGHT)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room: str) -> None:
    home = PACKAGE / room
    up = [
        f"{short(path)} imports {name}"
        for path in (home.rglob("*.py") if home.is_dir() else [home.with_suffix(".py")])
        for name in imported(path)
        if (other := re.match(r"megatron_rl\.(\w+)", name)) and other[1] in HEIGHT
        if other[1] != room and HEIGHT[other[1]] >= HEIGHT[room]
    ]
    assert not up


def test_observe_looks_at_files_alone() -> None:
    names = tuple(f"megatron_rl.{name}" for name in SEEN_BY_OBSERVE)
    others = [
        f"{short(path)} imports {name}"
        for path in (PACKAGE / "observe").rglob("*.py")
        for name in imported(path)
        if name.startswith("megatron_rl.") and not name.startswith(names) and name != "megatron_rl.rollout"
        if name != "megatron_rl.__version__"
    ]
    assert not others


@pytest.mark.parametrize("package", DOORS)
def test_heavy_packages_come_in_by_their_doors(package: str) -> None:
    doors = tuple(f"megatron_rl/{door}" for door in DOORS[package])
    elsewhere = {
        short(path)
        for path in PACKAGE.rglob("*.py")
        if not short(path).startswith(doors) and any(name.split(".")[0] == package for name in imported(path))
    }
    assert not elsewhere


def test_objectives_import_torch_alone() -> None:
    def allowed(name: str) -> bool:
        root = name.split(".")[0]
        return root == "torch" or root in sys.stdlib_module_names or re.match(r"megatron_rl\.objectives\b", name) is not None

    others = {
        f"{short(path)} imports {name}"
        for path in (PACKAGE / "objectives").rglob("*.py")
        for name in imported(path)
        if not allowed(name)
    }
    assert not others


def test_one_module_asks_whether_there_is_a_gpu() -> None:
    asking = {short(path) for path in PACKAGE.rglob("*.py") if "cuda.is_available" in path.read_text()}
    assert asking == {"megatron_rl/policy/device.py"}


def test_files_are_short() -> None:
    lengths = {short(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: length for path, length in lengths.items() if length > LONGEST_FILE}


def test_functions_are_short() -> None:
    lengths = {
        f"{short(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert not {function: length for function, length in lengths.items() if length > LONGEST_FUNCTION}


def test_no_file_knows_one_machine_or_one_package_index() -> None:
    forbidden = re.compile(r"(?<![\w.~}/-])/(?:work|root)/|https?://[^\s/]+/simple|(?:extra-)?index-url\s*=")
    texts = SOURCES + [
        path
        for folder, pattern in {
            ".": "*",
            ".ci": "*",
            "launch": "**/*",
            "configs": "**/*",
            "docs": "**/*",
            "tools": "**/*",
        }.items()
        for path in sorted((ROOT / folder).glob(pattern))
        if path.is_file() and path.suffix in {".md", ".toml", ".yaml", ".json", ".sh", ".lock", ".override", ""}
    ]
    found = [
        f"{short(path)}:{number}: {line.strip()[:100]}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path != Path(__file__) and forbidden.search(line)
    ]
    assert not found

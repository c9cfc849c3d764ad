"""The machine that a plan reckons with: memory, speeds and what share of them is reached, out of a YAML file.

Files for common GPUs lie beside this module, in `machines/`; `megatron-rl plan --machine FILE` takes one of your own. Every
number has a meaning: what the maker states, what was measured, or what was fitted to published runs, as the file says.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError
from pydantic.fields import FieldInfo

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.names import allowed_values
from megatron_rl.config.section import Section
from megatron_rl.config.yaml_values import Value, read_yaml

MACHINES = Path(__file__).parent / "machines"
GIB = 2**30


class Peaks(Section):
    """10^12 operations a second in dense matrix products, as stated by the maker."""

    bfloat16: PositiveFloat = Field(description="bfloat16 operands.")
    float32: PositiveFloat = Field(description="float32 operands.")
    fp8: PositiveFloat | None = Field(None, description="8-bit operands; none: the device has no such products.")


class Link(Section):
    """A way between devices, as one of them sees it."""

    gb_s: PositiveFloat = Field(description="10^9 bytes a second in one direction, for one device.")
    latency_us: PositiveFloat = Field(description="Microseconds that a collective over it takes beyond its bytes.")


class Shares(Section):
    """What share of the stated speeds is reached, between 0 and 1."""

    matmul: float = Field(gt=0, le=1, description="Products with dense weights, in bfloat16 or float32.")
    matmul_fp8: float = Field(gt=0, le=1, description="The same in FP8, casts apart.")
    grouped: float = Field(gt=0, le=1, description="Products of many experts, as a share of what a dense product reaches.")
    attention: float = Field(gt=0, le=1, description="The core of attention, of the bfloat16 peak.")
    memory: float = Field(gt=0, le=1, description="Reading and writing device memory.")
    inside: float = Field(gt=0, le=1, description="Collectives inside a domain.")
    between: float = Field(gt=0, le=1, description="Collectives between domains.")
    decode: float = Field(
        gt=0, le=1, description="What a server reaches of the bound that reading weights, keys and values sets."
    )


class Costs(Section):
    """What is paid beside operations and bytes."""

    layer_us: PositiveFloat = Field(description="Microseconds of host work, not hidden, for a layer of one pack, forward.")
    expert_us: PositiveFloat = Field(description="The same for each expert of a layer that the rank holds.")
    step_us: PositiveFloat = Field(description="Microseconds between two tokens of a server: scheduling and sampling.")
    server_layer_us: PositiveFloat = Field(description="The same for each of its layers: kernels too small to fill the device.")
    imbalance: float = Field(ge=1, description="Tokens of the busiest expert rank over the mean.")
    packing: float = Field(gt=0, le=1, description="How full packs are on average.")
    publish_s: float = Field(ge=0, description="Seconds of a publish beside its bytes: asking, pausing, naming, probing.")


class Machine(Section):
    """A kind of device, in machines of several, as a plan knows it."""

    name: str = Field(description="What it is called in tables.")
    source: str = Field(description="Where the numbers come from.")
    cpu: bool = Field(False, description="No GPU: a rank is a process, servers compute in float32.")
    domain: PositiveInt = Field(description="Devices that the link `inside` joins.")
    memory_gib: PositiveFloat = Field(description="GiB of a device that programs can use.")
    reserve_gib: PositiveFloat = Field(
        description="GiB kept free of what is reckoned: CUDA context, NCCL's buffers, workspaces, fragmentation."
    )
    asleep_gib: float = Field(ge=0, description="GiB that a sleeping server keeps: CUDA context and graphs.")
    static_share: float = Field(
        gt=0, lt=1, description="Share of a server's free memory for weights, keys and values, where the settings say nothing."
    )
    memory_gb_s: PositiveFloat = Field(description="10^9 bytes a second of device memory.")
    host_gb_s: PositiveFloat = Field(description="10^9 bytes a second between a device and its host's memory.")
    disk_gb_s: PositiveFloat = Field(description="10^9 bytes a second that a server loads from files.")
    load_gb_s: PositiveFloat = Field(description="10^9 bytes a second at which a server puts received weights in their places.")
    tflops: Peaks
    inside: Link
    between: Link
    shares: Shares
    costs: Costs

    @property
    def usable_bytes(self) -> float:
        """Of a device, without the reserve."""
        return (self.memory_gib - self.reserve_gib) * GIB

    def link(self, span: int) -> tuple[float, float]:
        """Bytes a second and seconds of latency of collectives over devices that lie within `span` neighbouring ranks."""
        link, share = (self.inside, self.shares.inside) if span <= self.domain else (self.between, self.shares.between)
        return link.gb_s * 1e9 * share, link.latency_us * 1e-6


def known_machines() -> list[str]:
    """The names that `--gpu` and `cluster.gpu` may be."""
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def find_machine(name: str) -> Machine:
    """The machine of that name, or an error that says which there are."""
    plain = name.lower().removeprefix("nvidia").strip(" -_")
    path = MACHINES / f"{plain}.yaml"
    if plain not in known_machines():
        nearest = difflib.get_close_matches(plain, known_machines(), n=1)
        advice = f"Did you mean {nearest[0]}? " if nearest else ""
        raise SettingsError(
            f"there is no machine file for the GPU {name}. {advice}Known are {', '.join(known_machines())}; for another, copy "
            f"one of them from {MACHINES}, change its numbers, and give it with --machine."
        )
    return read_machine(path)


def read_machine(path: Path) -> Machine:
    """The machine that a file describes. Everything wrong with it is said at once, each with its place."""
    values = read_yaml(path, f"Give the path of a machine file, such as a copy of one in {MACHINES}.")
    fields = dict(_fields(Machine, ""))
    problems = [_unknown(name, value, fields) for name, value in values.items() if name not in fields]
    problems += [
        f"{path}: {name} is missing: {field.description} It is {allowed_values(field)}."
        for name, field in fields.items()
        if field.is_required() and name not in values
    ]
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value.value
    try:
        machine = Machine.model_validate_json(json.dumps(nested), strict=True)
    except ValidationError as error:
        wrong = {".".join(map(str, detail["loc"])) for detail in error.errors()}
        problems += [
            f"{values[name].where}: {name} = {json.dumps(values[name].value)}: expected {allowed_values(fields[name])}."
            for name in values
            if name in wrong and name in fields
        ]
        raise SettingsError("\n".join(problems)) from None
    return machine


def _fields(section: type[Section], prefix: str) -> list[tuple[str, FieldInfo]]:
    found: list[tuple[str, FieldInfo]] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += _fields(kind, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", field))
    return found


def _unknown(name: str, value: Value, fields: dict[str, FieldInfo]) -> str:
    nearest = difflib.get_close_matches(name, fields, n=1)
    return f"{value.where}: {name} is nothing that a machine file holds. " + (
        f"Did you mean {nearest[0]}?" if nearest else f"It holds {', '.join(fields)}."
    )

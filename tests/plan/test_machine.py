"""Machine files: those that are there, and what is said of wrong ones."""

from pathlib import Path

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.plan.machine import MACHINES, find_machine, known_machines, read_machine

H100 = (MACHINES / "h100.yaml").read_text()


@pytest.mark.parametrize("name", known_machines())
def test_machines_that_are_there(name: str) -> None:
    machine = find_machine(name)
    assert 0 < machine.usable_bytes < machine.memory_gib * 2**30
    assert machine.link(machine.domain)[0] > machine.link(machine.domain + 1)[0]


@pytest.mark.parametrize("name", ["H100", "h100", "NVIDIA H100", "nvidia-h100"])
def test_a_name_may_be_written_in_several_ways(name: str) -> None:
    assert find_machine(name) == find_machine("h100")


def test_an_unknown_name_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(SettingsError, match=r"GPU h10\. Did you mean h100\? Known are a100, .*; for another, copy one of them"):
        find_machine("h10")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (H100.replace("memory_gb_s: 3350", "memory_gbs: 3350"), r"memory_gbs is nothing .* Did you mean memory_gb_s\?"),
        (H100.replace("memory_gb_s: 3350\n", ""), r"memory_gb_s is missing: 10\^9 bytes a second of device memory"),
        (H100.replace("domain: 8", "domain: eight"), r"wrong\.yaml:\d+: domain = \"eight\": expected a whole number"),
        (H100.replace("grouped: 0.8", "grouped: 1.8"), r"wrong\.yaml:\d+: shares\.grouped = 1\.8: expected a number above 0"),
        (H100.replace("bfloat16: 989", "bfloat16: -1"), r"tflops\.bfloat16 = -1: expected a number above 0"),
        ("name: [", "not valid YAML"),
    ],
    ids=["misspelt", "missing", "text", "beyond one", "negative", "no YAML"],
)
def test_wrong_files_are_refused_with_the_place(wrong: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(wrong)
    with pytest.raises(SettingsError, match=said):
        read_machine(path)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(H100.replace("domain: 8", "domain: eight").replace("memory_gb_s: 3350", "memory_gbs: 3350"))
    with pytest.raises(SettingsError) as error:
        read_machine(path)
    assert len(str(error.value).splitlines()) == 3  # the unknown name, the one that is missing for it, the wrong value


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: cannot be read: .*\. Give the path of a machine file"):
        read_machine(Path("nowhere.yaml"))

"""Folders of a publish by disk, and what is chosen before it."""

import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.publish_settings import PublishSettings
from megatron_rl.weights.publish.files import MEMORY, PREFIX, choose_folder, is_here, make_folder, write_bucket
from megatron_rl.weights.publish.groups import own_address
from megatron_rl.weights.publish.ports import Target
from megatron_rl.weights.publish.publisher import choose_way


def test_the_folder_of_the_settings_is_made_and_must_have_room(tmp_path: Path) -> None:
    assert choose_folder(tmp_path / "a" / "b", 1000, everybody_here=False) == tmp_path / "a" / "b"
    with pytest.raises(SettingsError, match=r"take 1000000000\.0 GB; .* GB free\. Name another folder with publish\.folder"):
        choose_folder(tmp_path, 10**18, everybody_here=True)


def test_without_a_folder_files_go_to_memory_on_one_machine_alone() -> None:
    assert choose_folder(None, 1000, everybody_here=True) == MEMORY
    with pytest.raises(SettingsError, match=r"Name it with publish\.folder, or use publish\.transport=broadcast"):
        choose_folder(None, 1000, everybody_here=False)


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = tmp_path / f"{PREFIX}.{socket.gethostname()}.{2**22 + 1}.3"  # above the largest process id
    alive = tmp_path / f"{PREFIX}.{socket.gethostname()}.{os.getppid()}.3"
    elsewhere = tmp_path / f"{PREFIX}.{socket.gethostname()}x.{2**22 + 1}.3"
    for folder in (dead, alive, elsewhere):
        folder.mkdir()
        (folder / "weights").write_text("")
    made = make_folder(tmp_path, 4)
    assert not dead.exists() and alive.exists() and elsewhere.exists()
    assert made.stat().st_mode & 0o777 == 0o700
    (made / "half").write_text("")
    assert list(make_folder(tmp_path, 4).iterdir()) == []  # a second try of the same version starts afresh


def test_a_bucket_is_a_safetensors_file(tmp_path: Path) -> None:
    parcel = [("b", torch.randn(3, 4)), ("a", torch.randn(5).bfloat16()), ("c", torch.randn(2, 2).to(torch.float8_e4m3fn))]
    write_bucket(tmp_path, 1, 2, parcel)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"
    loaded = load_file(path)
    assert loaded.keys() == {"a", "b", "c"}
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in parcel)


def test_who_is_here() -> None:
    assert is_here("http://127.0.0.1:30000") and is_here("http://localhost:30000")
    assert not is_here("http://192.0.2.1:30000")  # of a network kept for documentation
    assert own_address("http://127.0.0.1:30000") == "127.0.0.1"


def test_the_way_is_the_fastest_that_there_is() -> None:
    apart, together = [Target("http://a:1")], [Target("http://a:1", (0, 1))]
    auto = PublishSettings()
    assert choose_way(auto, cuda=False, here=True, targets=apart) == "disk"
    assert choose_way(auto, cuda=False, here=False, targets=apart) == "broadcast"
    assert choose_way(PublishSettings(folder=Path("/shared")), cuda=False, here=False, targets=apart) == "disk"
    assert choose_way(auto, cuda=True, here=True, targets=apart) == "broadcast"
    assert choose_way(auto, cuda=True, here=True, targets=together) == "tensor"
    # NCCL connects no two processes on one GPU.
    assert choose_way(auto, cuda=True, here=True, targets=together, colocated=True) == "tensor"
    assert choose_way(auto, cuda=True, here=True, targets=[*apart, *together], colocated=True) == "disk"
    assert choose_way(auto, cuda=False, here=False, targets=apart, colocated=True) == "broadcast"
    with pytest.raises(SettingsError, match=r"publish\.transport=auto"):
        choose_way(PublishSettings(transport="broadcast"), cuda=True, here=True, targets=apart, colocated=True)
    assert choose_way(PublishSettings(transport="tensor"), cuda=False, here=False, targets=apart) == "tensor"
    with pytest.raises(SettingsError, match=r"publish\.transport=broadcast"):
        choose_way(PublishSettings(transport="tensor"), cuda=True, here=True, targets=[*apart, *together])

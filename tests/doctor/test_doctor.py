"""The doctor on a machine that is well, as several ranks; and what holds of every finding."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import LayoutSettings
from megatron_rl.doctor.clock import age, judge
from megatron_rl.doctor.examine import CHECKS, Check, chosen, made
from megatron_rl.doctor.finding import Finding, error, warning, well, worst
from megatron_rl.doctor.ranks import shrunk
from megatron_rl.doctor.servers import check_servers
from megatron_rl.doctor.tell import SCHEMA
from megatron_rl.doctor.visit import Visit
from megatron_rl.rollout.server import free_ports
from tests.doctor.environments import distribution, doctor, environment, heard, here, start
from tests.pages import ROOT
from tests.reference.tiny import write_tiny_config
from tests.servers import TinyServer

PAGE = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
EXPERT_PAIR = ["layout.world_size=2", "layout.expert=2", "precision.dtype=float32", "cluster.gpus_per_node=2"]


def test_a_machine_that_is_well(tmp_path: Path, tiny_server: TinyServer) -> None:
    """Two ranks that a launcher has started, and a server that is up: all is looked at, and told once, by the main rank."""
    (port,) = free_ports(1)
    shared = environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    words = [f"policy.config={tiny_server.model}", "batch.max_tokens=512", f"run.directory={tmp_path}/run", *EXPERT_PAIR]
    words += ["--server", tiny_server.server.url]
    main, other = (start(words, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2))
    with other:
        told = heard(main)
        assert other.communicate(timeout=60)[0] == "" and other.returncode == 0
    assert (told.code, told.verdict["counts"]["error"]) == (0, 0), told.verdict["findings"]
    assert {line["check"] for line in told.verdict["findings"]} == set(CHECKS)
    assert told.says("step", "ok", "a toy policy has learned on the CPU")
    assert told.says("servers", "ok", "it has generated 8 tokens")
    for name in ("expert all-to-all", "expert all-reduce", "world all-reduce", "see one folder and its locks", "the clock of"):
        assert any(name in line["what"] for line in told.verdict["findings"] if line["check"] == "ranks"), name
    assert not list(tmp_path.iterdir()), "something is left behind"


def test_ranks_and_a_step_that_cannot_begin(tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", "torch", "2.11.0", torch="raise ImportError('libcudart.so.13: cannot open')")
    config = write_tiny_config("qwen3_moe", tmp_path)
    told = doctor("+ranks", "+step", f"policy.config={config}", *EXPERT_PAIR, env=environment(site))
    assert told.says(
        "ranks", "error", "2 ranks of this machine cannot work together: it ended with code 1: ImportError: libcudart"
    )
    assert told.says("step", "error", "it began to load torch and Megatron-core") and told.code == 1
    assert "GLOO_SOCKET_IFNAME" in told.of("ranks", "error")[0]["fix"]


def test_a_file_system_that_lies_about_time(tmp_path: Path) -> None:
    path = tmp_path / "now"
    path.write_text("now")
    assert judge(age(path), "its clock", "").level == "ok"
    for away, level in ((30.0, "warning"), (-3600.0, "error")):
        os.utime(path, (time.time() - away,) * 2)
        found = judge(age(path), "its clock", "")
        assert found.level == level and found.numbers["seconds"] == pytest.approx(away, abs=1.0)
        assert ("behind" if away > 0 else "ahead of") in found.what


def test_a_check_that_fails_is_a_finding() -> None:
    def breaks(visit: Visit) -> Iterator[Finding]:
        yield well("so far", "here")
        raise OSError("and no farther")

    first, last = made("folder", Check(breaks, "", "run"), Visit())
    assert (first.what, first.check) == ("so far", "folder")
    assert last.level == "error" and "OSError: and no farther" in last.what


def test_a_finding_that_is_no_good_has_a_fix() -> None:
    with pytest.raises(ValueError, match="needs a fix"):
        Finding("error", "broken", "here")
    found = error("broken", "here", "mend it", bytes=1.0)
    assert Finding(**json.loads(json.dumps(found.to_json()))) == found
    assert worst([]) == worst([well("", "")]) == "ok"
    assert worst([warning("", "", "x"), well("", "")]) == "warning"
    assert worst([found, warning("", "", "x")]) == "error"


def test_two_ranks_stand_for_many() -> None:
    """They are laid along the first axis that the layout has."""
    assert shrunk(LayoutSettings(tensor=8, expert=8, pipeline=4)) == LayoutSettings(tensor=2)
    assert shrunk(LayoutSettings(expert=64, context=2)) == LayoutSettings(expert=2)
    assert shrunk(LayoutSettings(world_size=64)) == LayoutSettings()


def test_checks_are_chosen_by_name() -> None:
    assert chosen(["ports", "gpus"], step=True) == ["gpus", "ports"]
    assert chosen([], step=False) == [name for name in CHECKS if name != "step"]
    result = CliRunner().invoke(app, ["doctor", "--only", "port"])
    assert result.exit_code == 2 and "Did you mean ports?" in result.output


def test_for_people() -> None:
    result = CliRunner().invoke(app, ["doctor", "--only", "settings", "policy.confg=x"])
    assert result.exit_code == 1
    assert "unknown setting policy.confg" in result.output and "→ " in result.output
    assert "\n1 error, 0 warnings, 0 things in order" in result.output or "\n2 errors, 0 warnings, 0 things" in result.output


def test_a_settings_file_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["doctor", "--only", "settings", "nowhere.yaml"])
    assert result.exit_code == 1
    assert "there is no file nowhere.yaml" in result.output and "→ Name the settings file of the run" in result.output
    assert "\n1 error, 0 warnings, 0 things in order" in result.output


def test_a_server_that_is_gone_is_told_with_the_file_that_names_it(tmp_path: Path) -> None:
    listed, asked = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    (tmp_path / "urls").write_text(f"{listed}\n")
    settings = load_settings(None, ["policy.config=m", f"servers.urls_file={tmp_path / 'urls'}"])
    fixes = {finding.where: finding.fix for finding in check_servers(Visit(settings=settings, urls=(asked,)))}
    assert fixes.keys() == {listed, asked}
    assert f"If the job that wrote it into {tmp_path / 'urls'} is gone" in fixes[listed] and "is gone" not in fixes[asked]


def test_the_page_tells_of_every_check_and_every_field() -> None:
    told = here("+ports").verdict
    assert told["schema"] == SCHEMA and f'"schema": {SCHEMA}' in PAGE
    assert [name for name in CHECKS if f"| `{name}` |" not in PAGE] == []
    assert [name for name in (*told, *told["findings"][0]) if f"`{name}`" not in PAGE] == []
    help_text = CliRunner().invoke(app, ["doctor", "--help"]).output
    assert [name for name in CHECKS if name not in help_text] == []

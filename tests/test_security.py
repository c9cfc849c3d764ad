"""What SECURITY.md promises and no other test holds: who may open a folder, and which code could run what others wrote."""

import ast
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.config.rules.case import Case
from megatron_rl.config.rules.training import first_weights_are_there
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.observe.journal import Journal
from megatron_rl.observe.records import RunRecord
from megatron_rl.rollout.bank.files import private_folder
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.train.folder import REINFORCEMENT, begin

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_rl"
PAGE = (ROOT / "SECURITY.md").read_text()
# Calls that could run, or be made to run, what somebody else wrote, by the last words of their dotted names.
UNPICKLES = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "torch.load", "shelve.open"}
BETWEEN_RANKS = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "recv_object_list"}
EVALUATES = {"eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "yaml.load", "yaml.unsafe_load"}
PROGRAMS = "rewards/sandbox/"  # where what a model wrote is run, behind walls


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Calls in a file by their dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def places(names: set[str]) -> set[str]:
    """The files of the package that call one of these."""
    plain = {name for name in names if "." not in name}
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for name, _ in calls(path)
        if name in names or name.rpartition(".")[2] in plain & BETWEEN_RANKS
    }


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_new_folders_are_their_owners_alone(tmp_path: Path, open_umask: None) -> None:
    settings = load_settings(None, ["policy.config=model", f"run.directory={tmp_path / 'runs/mine'}"])
    begin(settings, REINFORCEMENT)
    assert [mode(tmp_path / name) for name in ("runs", "runs/mine")] == [0o700, 0o700]
    with Bank(tmp_path / "elsewhere/bank"):
        assert mode(tmp_path / "elsewhere/bank") == 0o700
    run = RunRecord("", "", {}, host="", ranks=1, model="", parameters=1, command=(), started=0.0)
    Journal(tmp_path / "journal").started(run, 0)
    assert mode(tmp_path / "journal") == 0o700


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    private_folder(tmp_path)
    private_folder(tmp_path / "new")
    assert (mode(tmp_path), mode(tmp_path / "new")) == (0o750, 0o700)


# -- code of others ----------------------------------------------------------------------------------------------------


def test_what_unpickles_is_what_the_page_lists() -> None:
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", PAGE, re.M))
    assert places(UNPICKLES) | places(BETWEEN_RANKS) == listed
    assert places(BETWEEN_RANKS) == {"policy/layout.py"}


def test_nothing_outside_the_sandbox_evaluates_text_or_starts_a_shell() -> None:
    assert {place for place in places(EVALUATES) if not place.startswith(PROGRAMS)} == set()
    for path in PACKAGE.rglob("*.py"):
        for name, call in calls(path):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("shell", "False") == "False", f"{path}: {name} starts a shell"
            if name.endswith(".from_pretrained"):  # it would ask a user who sits at a terminal
                assert given.get("trust_remote_code") == "False", f"{path}: {name} runs code of a checkpoint"


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "tokenization_mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}}')
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "tokenization_mine.Mine"}}')
    with pytest.raises(Exception, match="no tokenizer can be loaded"):
        Tokenizer(str(tmp_path))
    assert not ran.exists()


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    settings = load_settings(None, [f"policy.init={tmp_path}"])
    case = Case(settings, read_architecture(ROOT / "configs/models/toy-moe"), 1)
    assert any("safetensors" in line for line in first_weights_are_there(case))


def test_a_tag_in_settings_makes_no_object(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"policy: {{config: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']}}\n")
    with pytest.raises(SettingsError):
        load_settings(path)
    assert not (tmp_path / "made").exists()


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_tests_that_the_page_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert len(named) == 7 and all((ROOT / name).is_file() for name in named)
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / link).exists(), link

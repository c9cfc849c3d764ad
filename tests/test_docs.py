"""The pages say nothing that is not there: commands with their options and settings, links, names of settings."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import megatron_rl
from megatron_rl.cli import app
from megatron_rl.config.load import load_settings, names_settings_file
from megatron_rl.config.names import FOREIGN_NAMES, open_name, open_names, section_names, setting_fields
from megatron_rl.observe.vocabulary import KNOWN
from tests.pages import COMMANDS, PAGES, ROOT, Line, short
from tools.settings_docs import PAGE as SETTINGS
from tools.settings_docs import text as settings_text

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
# Names in backticks that look like settings of one of our sections, and are modules, methods or files.
OTHERWISE = re.compile(r"\.(py|md|yaml|json|jsonl|toml|parquet|html|sh|svg|lock|partial)\b|[(/]")


@cache
def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@cache
def program() -> Any:
    return typer.main.get_command(app)


def parameters(line: Line) -> dict[str, Any]:
    """What the program reads in the words; it raises where they name no command or option that there is."""
    command, words = program(), line.words
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if not words or words == ["--help"]:
        return {}
    try:
        found: dict[str, Any] = command.make_context(command.name, words).params
    except Exception as error:
        if line.whole or type(error).__name__ != "MissingParameter":
            raise AssertionError(f"{line}: {error.format_message() if hasattr(error, 'format_message') else error}") from error
        return {}
    return found


def require_setting(name: str) -> None:
    known = name in setting_fields() or name in section_names() or open_name(name) is not None
    assert known, f"there is no setting {name}"


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_a_command_is_understood(line: Line) -> None:
    """Its options and arguments exist, its overrides name settings and have values that fit, and its files are there."""
    given = parameters(line)
    changes = list(given.get("overrides") or ())
    words = [str(value) for value in given.values() if isinstance(value, Path | str)] + changes
    for path in (word for word in words if word.startswith(("configs/", "docs/"))):
        assert (ROOT / path).exists(), f"{path} is not there"
    overrides = [word for word in words if OVERRIDE.match(word)]
    assert set(changes) <= {*overrides, *filter(names_settings_file, changes)}
    load_settings(None, ["policy.config=model", *overrides])


def test_there_are_commands_to_look_at() -> None:
    """The search finds what stands in blocks and in sentences: README.md has every command in it."""
    assert {line.words[0] for line in COMMANDS if line.page.name == "README.md"} == set(program().commands)
    assert {line.whole for line in COMMANDS} == {True, False}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"`", "", heading)).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_settings_that_are_named_exist(page: Path) -> None:
    """`sampling.ahead`, also with a value behind: `sampling.ahead=2`, `sampling.ahead: 2`."""
    sections = {name.partition(".")[0] for name in setting_fields()}
    wrong = []
    said = prose(page)
    if page.name == "migration.md":
        said = re.sub(r"^\|[^|]*\|", "|", said, flags=re.M)  # first cells name other programs' settings
    for piece in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", said):
        found = re.match(r"([a-z_]+)\.([a-z_0-9.]+)(?==|:|$| )", piece)
        if found and found[1] == "batch" and page.name == "objectives.md":
            continue  # there it is what an objective is called with
        if found and found[1] in sections and not OTHERWISE.search(found[0]) and not is_module(found[0]):
            name = found[0].rstrip(".")
            if name not in setting_fields() and name not in section_names() and open_name(name) is None:
                wrong.append(name)
    assert not wrong


def test_names_of_other_trainers_lead_where_the_page_says() -> None:
    """`--eps-clip` and `algorithm.eps_clip` are answered alike, and as docs/migration.md answers them."""
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|$", (ROOT / "docs/migration.md").read_text(encoding="utf-8"), re.M)
    named = [(name.rpartition(".")[2].lstrip("-").replace("-", "_"), ours) for names, ours in rows for name in names.split("`")]
    known = [(FOREIGN_NAMES[name], ours) for name, ours in named if name in FOREIGN_NAMES and "sglang" not in ours]
    assert len(known) > 40
    assert [(setting, ours) for setting, ours in known if f"`{setting}" not in ours] == []
    for setting in FOREIGN_NAMES.values():
        require_setting(setting)


def test_messages_that_are_explained_are_said() -> None:
    """Symptoms in docs/troubleshooting.md are quotations: three words of each, on end, are somewhere in the code."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "megatron_rl").rglob("*.py")]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    said = " ".join(" ".join(text for text in texts if isinstance(text, str)).split())
    cells = re.findall(r"^\| ([^|]*) \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)
    quoted = [quote.split() for cell in cells for quote in re.findall(r"`([^`]+)`", cell) if len(quote.split()) > 3]
    assert len(quoted) > 20
    wrong = [words for words in quoted if not any(" ".join(words[i : i + 3]) in said for i in range(len(words) - 2))]
    assert not wrong


def test_metrics_that_are_explained_exist() -> None:
    """The names in the table of docs/training.md are those that the journal and the report know."""
    table = (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("| metric | meaning")[2]
    names = [name for cell in re.findall(r"^\| (`[^|]*) \|", table, re.M) for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 40
    assert set(names) - set(KNOWN) == {"seconds/PHASE"}


def is_module(name: str) -> bool:
    """`rollout.pool`, or something in it: a place in the package, whose rooms share names with sections."""
    folder = Path(megatron_rl.__file__).parent
    *parents, last = name.split(".")
    return any((folder.joinpath(*parts)).with_suffix(".py").is_file() for parts in ([*parents, last], parents))


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_settings_files_in_the_pages_load(page: Path) -> None:
    """Blocks of YAML whose names are sections are settings."""
    for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        values = yaml.safe_load(block)
        if not isinstance(values, dict) or not set(values) <= set(section_names() | set(setting_fields())):
            continue
        names = [f"{section}.{name}" for section, members in values.items() if section in section_names() for name in members]
        for name in names:
            require_setting(name)


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_files_that_are_named_exist(page: Path) -> None:
    """Also those that a command is given which is not ours: `python docs/examples/falling.py`."""
    named = re.findall(r"\b(?:docs|configs|launch|tools)/[\w/.-]*\.(?:py|sh|yaml|md|lock)\b", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs/examples").glob("*.py")), ids=short)
def test_examples_import_what_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_rl":
            assert {alias.name for alias in node.names} <= set(megatron_rl.__all__)


def test_the_page_of_settings_is_up_to_date() -> None:
    assert SETTINGS.read_text(encoding="utf-8") == settings_text(), "run python tools/settings_docs.py"


def test_open_settings_are_told_as_such() -> None:
    assert all(f"| `{name}` | named values |" in settings_text() for name in open_names())

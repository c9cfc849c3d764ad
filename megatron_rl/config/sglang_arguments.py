"""SGLang's own server arguments: which there are, what they take, and how they are written on its command line.

They are read from the source of the installed version, `sglang/srt/server_args.py`, without importing it (which would cost ten
seconds and a CUDA library): every argument is an annotated field of the class `ServerArgs`.
"""

import ast
import difflib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from megatron_rl.config.errors import SettingsError

type Kind = Literal["flag", "switch", "integer", "number", "text", "list"]

# What is settled elsewhere, and where.
TAKEN = {
    "model_path": "the model is named once for all servers",
    "host": "servers.host says where servers listen",
    "port": "servers.port says where servers listen",
    "api_key": "servers.api_key_file names the file that holds it",
    "admin_api_key": "servers.api_key_file names the file that holds the key",
    "config": "write its contents here",
}
SIMILAR = 0.6  # difflib ratio from which a name counts as a slip of the pen for another


@dataclass(frozen=True)
class Argument:
    """One argument of the server: a flag is there or not, a switch has a `--no-` twin."""

    name: str
    option: str
    kind: Kind
    choices: tuple[Any, ...] = ()
    on_by_default: bool = False


@cache
def known_arguments() -> Mapping[str, Argument]:
    """Every argument of the installed SGLang, by its name and by its other spellings."""
    path = _source()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    server_arguments = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArgs"), None)
    if server_arguments is None:
        raise SettingsError(f"{path} declares no ServerArgs: this version of SGLang is not one that megatron-rl knows.")
    constants = _constants(tree)
    known: dict[str, Argument] = {}
    for field in server_arguments.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            for argument in _arguments(field, field.target.id, constants):
                known[argument.name] = argument
    return known | _added(server_arguments)


def check_arguments(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with arguments by name (`tp_size` or `tp-size`), one line each."""
    return [line for name, value in given.items() for line in _problems(name, value)]


def value_of(given: Mapping[str, Any], name: str) -> Any:
    """What an argument is given as, whichever of its spellings is used; None where it is not."""
    known = known_arguments()
    option = known[name].option
    values = [value for each, value in given.items() if (found := known.get(_plain(each))) and found.option == option]
    return values[-1] if values else None


def command_line(given: Mapping[str, Any]) -> list[str]:
    """Arguments as the server's command line takes them. Null and a flag that is off are left out."""
    problems = check_arguments(given)
    if problems:
        raise SettingsError("\n".join(problems))
    return [word for name, value in given.items() for word in _words(known_arguments()[_plain(name)], value)]


def _words(argument: Argument, value: Any) -> list[str]:
    match value:
        case None:
            return []
        case bool() if argument.kind == "switch":
            return [argument.option if value else argument.option.replace("--", "--no-", 1)]
        case bool():
            return [argument.option] if value else []
        case list() | tuple():
            return [argument.option, *map(str, value)]
        case dict():
            return [argument.option, json.dumps(value)]
        case _:
            return [f"{argument.option}={value}"]  # one word: a value may begin with a dash


def _problems(name: str, value: Any) -> Iterator[str]:
    plain, known = _plain(name), known_arguments()
    where = f"sglang.{name} = {json.dumps(value, default=str)}"
    if plain in TAKEN:
        yield f"{where}: {TAKEN[plain]}. Remove this one."
    elif plain not in known:
        nearest = difflib.get_close_matches(plain, known, n=1, cutoff=SIMILAR)
        advice = f"Did you mean sglang.{nearest[0]}?" if nearest else "`python -m sglang.launch_server --help` lists them."
        yield f"{where}: SGLang {metadata.version('sglang')} has no such server argument. {advice}"
    elif value is not None:
        argument = known[plain]
        expected = _expected(argument, value)
        if expected:
            yield f"{where}: expected {expected}."
        elif argument.on_by_default and value is False and argument.kind == "flag":
            yield f"{where}: it is on by default and SGLang offers no way to turn it off. Remove this one."


def _expected(argument: Argument, value: Any) -> str | None:
    """What the argument takes, in words, when this value is not it."""
    options = ", ".join(map(str, argument.choices))
    match argument.kind:
        case "flag" | "switch":
            return None if isinstance(value, bool) else "true or false"
        case "integer" if isinstance(value, bool) or not isinstance(value, int):
            return "a whole number"
        case "number" if isinstance(value, bool) or not isinstance(value, int | float):
            return "a number"
        case "list":
            return None if isinstance(value, list | tuple) and value else "a list of at least one entry"
        case "text" if isinstance(value, bool | list | tuple):
            return f"one of {options}" if options else "text"
    return f"one of {options}" if argument.choices and value not in argument.choices else None


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _source() -> Path:
    found = importlib.util.find_spec("sglang")
    path = Path(found.origin or "").parent / "srt" / "server_args.py" if found else None
    if path is None or not path.is_file():
        raise SettingsError("SGLang is not installed here (no sglang/srt/server_args.py). launch/setup.sh installs it.")
    return path


def _constants(tree: ast.Module) -> dict[str, tuple[Any, ...]]:
    """Module-level lists and sets of choices that are written out and never added to."""
    grown = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        if node.func.attr in ("append", "extend", "add", "update")
    }
    return {
        target.id: choices
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id not in grown and (choices := _literal(node.value))
    }


def _literal(node: ast.expr | None) -> tuple[Any, ...]:
    """The entries of a list, set or tuple that is written out; nothing for anything else."""
    if not isinstance(node, ast.List | ast.Set | ast.Tuple) or not all(isinstance(entry, ast.Constant) for entry in node.elts):
        return ()
    return tuple(entry.value for entry in node.elts if isinstance(entry, ast.Constant))


def _arguments(field: ast.AnnAssign, name: str, constants: Mapping[str, tuple[Any, ...]]) -> Iterator[Argument]:
    """The argument of one field `name: A[type, "help" or Arg(...), ...] = default`, under each of its names."""
    annotation = field.annotation
    if not (isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple)):
        return
    declared, *details = annotation.slice.elts
    meant = next((node for node in details if not isinstance(node, ast.Call) or _called(node) == "Arg"), None)
    options = {word.arg: word.value for word in meant.keywords if word.arg} if isinstance(meant, ast.Call) else {}
    if meant is None or "no_cli" in options:
        return
    kind, choices = _kind(declared, options)
    if "choices" in options:
        choices = _literal(options["choices"])
        if isinstance(options["choices"], ast.Name):
            choices = constants.get(options["choices"].id, ())
    option = f"--{name.replace('_', '-')}"
    if isinstance(options.get("cli_name"), ast.Constant):
        option = str(ast.literal_eval(options["cli_name"]))
    aliases = _literal(options.get("aliases"))
    on = isinstance(field.value, ast.Constant) and field.value.value is True
    for spelling in {name, *(_plain(alias.removeprefix("--")) for alias in (option, *aliases))}:
        yield Argument(spelling, option, kind, choices, on)


def _kind(declared: ast.expr, options: Mapping[str, ast.expr]) -> tuple[Kind, tuple[Any, ...]]:
    """What an annotated type takes, as SGLang's own `add_cli_args_from_dataclass` decides it."""
    text = ast.unparse(declared).removeprefix("Optional[")
    if "action" in options:
        return ("switch" if "BooleanOptionalAction" in ast.unparse(options["action"]) else "list"), ()
    if text.startswith("Literal["):
        return "text", tuple(node.value for node in ast.walk(declared) if isinstance(node, ast.Constant))
    if "type_parser" in options:
        return "text", ()
    if text.startswith(("List[", "list[")) or ("nargs" in options and ast.literal_eval(options["nargs"]) in ("+", "*")):
        return "list", ()
    kinds: dict[str, Kind] = {"bool": "flag", "int": "integer", "float": "number"}
    return kinds.get(text.removesuffix("]"), "text"), ()


def _added(server_arguments: ast.ClassDef) -> dict[str, Argument]:
    """The arguments that `add_cli_args` adds by hand, without those it only keeps to warn of."""
    added: dict[str, Argument] = {}
    for node in ast.walk(server_arguments):
        if isinstance(node, ast.Call) and _called(node) == "add_argument" and node.args:
            words = {word.arg: word.value for word in node.keywords if word.arg}
            action = ast.unparse(words["action"]) if "action" in words else ""
            if isinstance(node.args[0], ast.Constant) and "Deprecated" not in action:
                option = str(node.args[0].value)
                name = _plain(option.removeprefix("--"))
                added[name] = Argument(name, option, "flag" if "store_true" in action else "text")
    return added


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")

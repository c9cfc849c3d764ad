"""The list of SGLang's arguments, read from its source, against the parser that SGLang builds of it."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.sglang_arguments import check_arguments, command_line, known_arguments
from megatron_rl.rollout.server import CPU_STUB

GIVEN = {
    "tp_size": 2,
    "mem-fraction-static": 0.85,
    "disable_radix_cache": True,
    "enable_metrics": False,
    "cuda_graph_bs_decode": [1, 2, 4],
    "json_model_override_args": {"rope_theta": 1e6},
    "lora_strict_loading": False,
    "served_model_name": "--odd",
    "dtype": "bfloat16",
    "chunked_prefill_size": None,
}

# In a process of its own: SGLang changes transformers when it is imported.
DESCRIBE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
actions = [
    {"options": [option for option in action.option_strings if option.startswith("--")], "action": type(action).__name__,
     "type": getattr(action.type, "__name__", None), "nargs": action.nargs, "choices": action.choices and list(action.choices)}
    for action in parser._actions
]
parsed = vars(parser.parse_args(["--model-path", "m", *sys.argv[1:]]))
print(json.dumps({"actions": actions, "parsed": parsed}, default=str))
"""


@pytest.fixture(scope="module")
def sglang() -> dict[str, Any]:
    """SGLang's own parser: its actions, and what it makes of our command line for `GIVEN`."""
    environment = {**os.environ, "PYTHONPATH": str(CPU_STUB), "SGLANG_USE_CPU_ENGINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-W", "ignore", "-c", DESCRIBE, *command_line(GIVEN)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    described: dict[str, Any] = json.loads(output.splitlines()[-1])
    return described


@pytest.fixture(scope="module")
def actions(sglang: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the parser does at each option, those aside that it keeps to warn of."""
    return {
        option: action
        for action in sglang["actions"]
        for option in action["options"]
        if "Deprecated" not in action["action"] and not option.startswith("--no-") and option != "--help"
    }


def test_the_list_is_that_of_the_parser(actions: dict[str, dict[str, Any]]) -> None:
    known = known_arguments()
    assert {argument.option for argument in known.values()} <= actions.keys()
    assert {option.removeprefix("--").replace("-", "_") for option in actions} <= known.keys()


def test_kinds_are_those_of_the_parser(actions: dict[str, dict[str, Any]]) -> None:
    for argument in known_arguments().values():
        action = actions[argument.option]
        match argument.kind:
            case "flag":
                assert action["action"] == "_StoreTrueAction", argument
            case "switch":
                assert action["action"] == "BooleanOptionalAction", argument
            case "list":
                assert action["nargs"] in ("+", "*"), argument
            case "integer" | "number":
                assert action["type"] == {"integer": "int", "number": "float"}[argument.kind], argument
                assert action["nargs"] is None, argument
            case "text":
                assert action["nargs"] in (None, "?"), argument
        if argument.choices:
            assert list(argument.choices) == action["choices"], argument


def test_a_command_line_means_what_was_given(sglang: dict[str, Any]) -> None:
    expected = {
        "tp_size": 2,
        "mem_fraction_static": 0.85,
        "disable_radix_cache": True,
        "enable_metrics": False,
        "cuda_graph_bs_decode": [1, 2, 4],
        "json_model_override_args": '{"rope_theta": 1000000.0}',
        "lora_strict_loading": False,
        "served_model_name": "--odd",
        "dtype": "bfloat16",
    }
    assert {name: sglang["parsed"][name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tp_sise", 2, r"SGLang 0\.5\.17 has no such server argument\. Did you mean sglang\.tp_size\?"),
        ("qqqqqqqq", 2, "launch_server --help"),
        ("tp_size", "two", "expected a whole number"),
        ("tp_size", True, "expected a whole number"),
        ("mem_fraction_static", "much", "expected a number"),
        ("disable_radix_cache", "yes", "expected true or false"),
        ("schedule_policy", "lmp", "expected one of lpm, random, fcfs"),
        ("ep_join_mode", "sale", "expected one of scale, recover"),
        ("cuda_graph_bs_decode", 4, "expected a list"),
        ("port", 3000, r"servers\.port"),
        ("api_key", "k", r"servers\.api_key_file"),
    ],
)
def test_wrong_arguments_are_told(name: str, value: object, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        command_line({name: value})
    (line,) = check_arguments({name: value, "tp_size" if name != "tp_size" else "dtype": None})
    assert line.startswith(f"sglang.{name} = ")

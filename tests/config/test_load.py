"""Settings from files and overrides: precedence, YAML 1.2 scalars, errors that say where and what instead."""

import string
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.load import dump_settings, load_settings
from megatron_rl.config.names import nearest_name, setting_fields
from megatron_rl.config.settings import Settings

MODEL = "policy.config=a-model"


def write(folder: Path, **files: str) -> Path:
    """Write files named after the keywords; the first one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


# -- precedence --------------------------------------------------------------------------------------------------------


def test_defaults_need_only_the_model() -> None:
    settings = load_settings(None, [MODEL])
    assert settings == Settings.model_validate({"policy": {"config": "a-model"}})


def test_later_wins_setting_by_setting(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="include: [base.yaml, over.yaml]\nlayout: {expert: 4}\n",
        base="policy: {config: a-model}\nlayout: {tensor: 2, pipeline: 2, expert: 2}\nrun: {steps: 5}\n",
        over="layout:\n  pipeline: 3\n",
    )
    layout = load_settings(path, ["layout.context=2", "layout.context=3"]).layout
    assert (layout.tensor, layout.pipeline, layout.expert, layout.context) == (2, 3, 4, 3)
    assert load_settings(path, []).run.steps == 5


def test_further_files_are_laid_over_the_first_in_order(tmp_path: Path) -> None:
    """Each with what it includes, overrides in their places between them."""
    path = write(
        tmp_path,
        recipe="policy: {config: a-model}\nlayout: {tensor: 2}\nobjective: {options: {clip_low: 0.1}}\nrun: {steps: 5}\n",
        pair="include: cluster.yaml\nlayout: {pipeline: 3}\nobjective: {options: {}}\n",
        cluster="layout: {tensor: 4, pipeline: 2}\nrun: {steps: 6}\n",
        mine="run: {steps: 7}\n",
    )
    pair, mine = str(tmp_path / "pair.yaml"), str((tmp_path / "mine.yaml").rename(tmp_path / "mine.yml"))
    whole = load_settings(path, [pair, mine])
    assert (whole.layout.tensor, whole.layout.pipeline, whole.run.steps) == (4, 3, 7)
    assert whole.objective.options == {}  # written as a whole, it drops the recipe's members
    assert load_settings(path, [mine, pair]).run.steps == 6
    assert load_settings(path, ["layout.tensor=8", pair, "layout.pipeline=5"]).layout.model_dump(
        include={"tensor", "pipeline"}
    ) == {"tensor": 4, "pipeline": 5}
    assert load_settings(None, [str(path), pair]) == load_settings(path, [pair])


def test_what_is_wrong_in_a_further_file_is_told_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, recipe="policy: {config: a-model}\n", pair="layout:\n  tensr: 2\n")
    with pytest.raises(SettingsError, match=r"pair.yaml:2: unknown setting layout.tensr. Did you mean layout.tensor"):
        load_settings(path, [str(tmp_path / "pair.yaml")])
    with pytest.raises(SettingsError, match=r"nowhere.yaml: cannot be read: No such file"):
        load_settings(path, ["nowhere.yaml"])


def test_paths_in_a_further_file_are_looked_for_beside_it(tmp_path: Path) -> None:
    (tmp_path / "models" / "model").mkdir(parents=True)
    path = write(tmp_path, recipe="run: {steps: 5}\n")
    pair = write(tmp_path / "models", pair="policy: {config: model}\n")
    assert load_settings(path, [str(pair)]).policy.config == tmp_path / "models" / "model"


def test_includes_are_relative_to_the_including_file(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    path = write(tmp_path, top="include: parts/one.yaml\n")
    write(tmp_path / "parts", one="include: two.yaml\npolicy: {config: a-model}\n", two="run: {steps: 7}\n")
    assert load_settings(path, []).run.steps == 7


def test_a_file_may_be_included_twice_but_not_by_itself(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="include: [left.yaml, right.yaml]\n",
        left="include: base.yaml\n",
        right="include: base.yaml\n",
        base="policy: {config: a-model}\n",
    )
    load_settings(path, [])
    write(tmp_path, base="include: right.yaml\n")
    with pytest.raises(
        SettingsError, match=r"circle: \S*top.yaml -> \S*left.yaml -> \S*base.yaml -> \S*right.yaml -> \S*base.yaml"
    ):
        load_settings(path, [])


def test_empty_sections_and_files_change_nothing(tmp_path: Path) -> None:
    path = write(
        tmp_path, top="include: [base.yaml, empty.yaml]\nlayout:\nmoe: {}\n", base="layout: {tensor: 2}\n", empty="# nothing\n"
    )
    assert load_settings(path, [MODEL]).layout.tensor == 2


def test_dotted_names_and_mappings_say_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, top="layout.tensor: 2\nlayout: {pipeline: 3}\n")
    layout = load_settings(path, [MODEL, "layout={context: 4, expert: 5}"]).layout
    assert (layout.tensor, layout.pipeline, layout.context, layout.expert) == (2, 3, 4, 5)


def test_the_model_is_looked_for_beside_its_file_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "recipes", tmp_path / "working"
    for folder in (beside / "model", working / "model", working / "other"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(working)
    path = write(beside, top="policy: {config: model}\n")
    assert load_settings(path, []).policy.config == beside / "model"
    assert load_settings(path, ["policy.config=model"]).policy.config == working / "model"
    assert load_settings(write(beside, top="policy: {config: other}\n"), []).policy.config == working / "other"
    assert load_settings(path, ["policy.config=nowhere"]).policy.config == Path("nowhere")
    assert load_settings(path, ["run.directory=other"]).run.directory == Path("other")  # written, not looked for


# -- scalars -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value", [("1e-6", 1e-6), ("1E-6", 1e-6), ("2.5e+3", 2500.0), (".5", 0.5), ("3", 3.0), ("1.", 1.0)]
)
def test_floats_with_and_without_a_point(tmp_path: Path, text: str, value: float) -> None:
    path = write(tmp_path, top=f"optimizer: {{lr: {text}}}\n")
    assert load_settings(path, [MODEL]).optimizer.lr == value
    assert load_settings(None, [MODEL, f"optimizer.lr={text}"]).optimizer.lr == value


def test_yaml_1_1_surprises_do_not_happen() -> None:
    settings = load_settings(None, [MODEL, "precision.fp8=off", "run.directory=2024-01-01", "run.steps=010"])
    assert (settings.precision.fp8, settings.run.directory, settings.run.steps) == ("off", Path("2024-01-01"), 10)


def test_lists_nulls_and_booleans() -> None:
    overrides = [MODEL, "layout.pipeline_layers=[7,8]", "layout.sequence_parallel=false", "recompute.modules=[]"]
    settings = load_settings(None, overrides)
    assert settings.layout.pipeline_layers == (7, 8)
    assert settings.layout.sequence_parallel is False
    assert settings.recompute.modules == ()
    again = load_settings(None, [*overrides, "layout.pipeline_layers=null", "layout.sequence_parallel="])
    assert (again.layout.pipeline_layers, again.layout.sequence_parallel) == (None, None)


# -- round trip --------------------------------------------------------------------------------------------------------

PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).map(Path)


WORDS = st.text(string.ascii_letters + "_é", min_size=1)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(string.printable)
)


def values_of(annotation: Any, metadata: Any = ()) -> st.SearchStrategy[Any]:
    """All values that a field's declaration allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values_of(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if option is type(None) else values_of(option, metadata) for option in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        nested = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner), max_leaves=3)
        return st.dictionaries(WORDS, nested if arguments[1] is Any else values_of(arguments[1]), max_size=2)
    if issubclass(annotation, BaseModel):
        return st.fixed_dictionaries({name: values_of(f.annotation, f.metadata) for name, f in annotation.model_fields.items()})
    if annotation is str:
        return WORDS
    if annotation is Path:
        return PATHS.filter(lambda path: not path.exists())
    if annotation is bool:
        return st.booleans()
    limits = {name: getattr(limit, name) for limit in metadata for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)}
    low, high, above = limits.get("gt", limits.get("ge")), limits.get("lt", limits.get("le")), "gt" in limits
    if annotation is int:
        return st.integers(min_value=None if low is None else low + above)
    return st.floats(low, high, exclude_min=above, exclude_max="lt" in limits, allow_nan=False, allow_infinity=False)


ALL_SETTINGS = st.fixed_dictionaries(
    {name: values_of(field.annotation, field.metadata) for name, field in setting_fields().items()}
)


@property_settings(deadline=None, suppress_health_check=[HealthCheck.data_too_large])  # every setting at once is large
@given(ALL_SETTINGS)
def test_dumped_settings_load_as_equal_settings(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    settings = Settings.model_validate(nested)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_settings(settings), encoding="utf-8")
    assert load_settings(path, []) == settings


@pytest.mark.parametrize(
    "text", ["1e5", "010", "off", "yes", "null", "~", "2024-01-01", "0x10", "1:30", "[a]", "a: b", "\x85", "é"]
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    settings = Settings.model_validate({"policy": {"config": "a-model"}, "run": {"directory": text}})
    assert load_settings(write(tmp_path, dumped=dump_settings(settings)), []).run.directory == Path(text)


# -- wrong files and overrides -----------------------------------------------------------------------------------------

WRONG_FILES = {
    "unknown name": ("layout:\n  tensr: 2\n", r"top.yaml:2: unknown setting layout.tensr. Did you mean layout.tensor\?"),
    "name of another section": ("layout:\n\n  lr: 1\n", r"top.yaml:3: unknown .* layout.lr. Did you mean optimizer.lr\?"),
    "unknown section": ("layot: {tensor: 2}\n", r"top.yaml:1: unknown setting layot.tensor. Did you mean layout.tensor\?"),
    "empty unknown section": ("layot: {}\n", r"top.yaml:1: unknown setting layot"),
    "name without section": ("steps: 3\n", r"unknown setting steps. Did you mean run.steps\?"),
    "name of another trainer": ("layout: {tensor_model_parallel_size: 2}\n", r"Did you mean layout.tensor\?"),
    "no similar name": ("layout: {zzzzz: 2}\n", r"unknown setting layout.zzzzz. `megatron-rl settings` lists all"),
    "behind a setting": ("layout: {tensor: {size: 2}}\n", r"unknown setting layout.tensor.size. Did you mean layout.tensor\?"),
    "value for a section": ("layout: 4\n", r"top.yaml:1: layout = 4: this is a section. .* such as layout\.world_size\."),
    "name given twice": (
        "run: {steps: 1}\nlayout: {}\nrun: {steps: 2}\n",
        r"yaml:3: run.steps is set a second time, first at \S*:1",
    ),
    "name given twice, once dotted": ("run: {steps: 1}\nrun.steps: 2\n", r"top.yaml:2: run.steps is set a second time"),
    "zero": ("layout:\n  tensor: 0\n", r"top.yaml:2: layout.tensor = 0: expected a whole number of at least 1\."),
    "negative": ("optimizer: {lr: -1e-6}\n", r"optimizer.lr = -1e-06: expected a number of at least 0\."),
    "text for a number": ("optimizer: {lr: '1e-6'}\n", r'optimizer.lr = "1e-6": expected a number of at least 0\.'),
    "fraction for a whole number": ("run: {steps: 1.5}\n", r"run.steps = 1.5: expected a whole number of at least 1\."),
    "true for a number": ("run: {steps: true}\n", r"run.steps = true: expected a whole number of at least 1\."),
    "yes for true": ("layout: {sequence_parallel: yes}\n", r'sequence_parallel = "yes": expected true or false, or null\.'),
    "no such choice": ("precision: {fp8: e4m3}\n", r'"e4m3": expected one of off, transformer_engine, simulated\.'),
    "no such choice in a list": (
        "recompute: {modules: [mlp, at]}\n",
        r'\["mlp", "at"\]: expected a list, each entry one of core_attn',
    ),
    "number for a list": ("layout: {pipeline_layers: 4}\n", r"pipeline_layers = 4: expected a list, each entry a whole number"),
    "too large": (
        "optimizer:\n  beta1: 1\n",
        r"top.yaml:2: optimizer.beta1 = 1: expected a number of at least 0 and below 1\.",
    ),
    "number for text": (
        "launch: {time: 90}\n",
        r'top.yaml:1: launch.time = 90: expected text, or null. In quotes it is text: "90"\.$',
    ),
    "infinite": ("optimizer: {lr: 1e999}\n", r"top.yaml:1: 1e999 is neither .* nor a number within range"),
    "null where something must be": ("run: {steps: }\n", r"run.steps = null: expected a whole number of at least 1\."),
    "syntax": ("layout:\n  tensor: [1\nrun: {}\n", r"top.yaml:3: not valid YAML"),
    "two documents": ("run: {}\n---\nrun: {}\n", r"top.yaml:2: not valid YAML"),
    "control character": ("run: {directory: \x07}\n", r"top.yaml: not valid YAML: .* at character"),
    "no mapping": ("- layout\n", r"top.yaml:1: a settings file holds sections such as `layout:`"),
    "no plain name": ("? [a, b]\n: 1\n", r"top.yaml:1: the name of a setting must be plain text"),
    "python object": ("run: {directory: !!python/name:os.getcwd }\n", r"top.yaml:1: .*is neither text"),
    "wrong tag": ("run: {steps: !!int many}\n", r"'many' does not fit its tag"),
    "alias to itself": ("layout: &l {tensor: *l}\n", r"top.yaml:1: a YAML alias refers to what contains it"),
    "include of nothing": (
        "run: {}\ninclude: nowhere.yaml\n",
        r"yaml:2: include: nowhere.yaml is not a file beside \S*top.yaml",
    ),
    "include of a number": ("include: 3\n", r"top.yaml:1: include = 3: expected a file name or a list of file names"),
}


@pytest.mark.parametrize("text, message", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_says_where_and_what_instead(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(write(tmp_path, top=text), [MODEL])
    assert len(str(caught.value).splitlines()) == 1
    assert "pydantic" not in str(caught.value)


WRONG_OVERRIDES = {
    "no value": ("layout.tensor", r"command line: 'layout.tensor' is no override and no settings file. Write name=value"),
    "no name": ("=4", r"'=4' is no override"),
    "unknown": (
        "optimizer.learning_rate=1",
        r"command line: unknown setting optimizer.learning_rate. Did you mean optimizer.lr\?",
    ),
    "wrong value": ("layout.tensor=two", r'command line: layout.tensor = "two": expected a whole number of at least 1\.'),
    "number for text": (
        "launch.time=90",
        r"""launch.time = 90: expected text, or null. In quotes it is text: 'launch.time="90"'\.$""",
    ),
    "list for text": ("launch.time=[1]", r"launch.time = \[1\]: expected text, or null\.$"),
    "syntax": ("layout.pipeline_layers=[7,8", r"command line: layout.pipeline_layers=\[7,8: not valid YAML"),
    "include": ("include=base.yaml", r"command line: unknown setting include"),
}


@pytest.mark.parametrize("override, message", WRONG_OVERRIDES.values(), ids=WRONG_OVERRIDES)
def test_a_wrong_override_says_so(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(None, [MODEL, override])


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, top="include: base.yaml\nlayout: {tensr: 1, tensor: 0}\n", base="run: {steps: -1}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(path, ["moe.dispatcher=pigeon"])
    lines = str(caught.value).splitlines()
    expected = [
        "layout.tensr",
        "policy.config is not set",
        "layout.tensor = 0",
        "base.yaml:1: run.steps = -1",
        "moe.dispatcher",
    ]
    assert len(lines) == len(expected)
    assert all(any(words in line for line in lines) for words in expected)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.yaml: cannot be read: No such file"):
        load_settings(tmp_path / "nowhere.yaml", [])
    (tmp_path / "binary.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(SettingsError, match=r"binary.yaml: is not UTF-8 text"):
        load_settings(tmp_path / "binary.yaml", [])


# -- names -------------------------------------------------------------------------------------------------------------


@property_settings(deadline=None)
@given(st.data())
def test_one_slip_of_the_pen_still_finds_the_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in setting_fields() if len(name.rpartition(".")[2]) >= 6]))
    section, _, word = name.rpartition(".")
    place, letter = data.draw(st.integers(0, len(word) - 1)), data.draw(st.sampled_from(string.ascii_lowercase))
    slip = data.draw(st.sampled_from([word[:place] + word[place + 1 :], word[:place] + letter + word[place:]]))
    if f"{section}.{slip}" not in setting_fields():
        assert nearest_name(f"{section}.{slip}") == name


def test_every_setting_is_described() -> None:
    assert [name for name, field in setting_fields().items() if not field.description] == []

"""Prompts from every kind of source, as the model sees them; wrong ones are told with their fix."""

import importlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from megatron_rl.config.errors import DataError, SettingsError
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.data.prompts import PromptStream, open_prompts, open_tokenizer
from megatron_rl.data.tasks import TASKS, TaskOptions, task_rows
from megatron_rl.data.tokenizer import Tokenizer
from tests.data.byte_tokenizer import VOCAB, write_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": f"question {i} " + "x" * (i % 7), "solution": str(i), "limit": 10 + i, "level": {"hard": i % 2}}
    for i in range(23)
]

type Open = Callable[..., PromptStream]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(str(model))


@pytest.fixture
def opened(tmp_path: Path, tokenizer: Tokenizer) -> Open:
    """Prompts of sources, with other data settings by name."""

    def open_it(*sources: dict[str, Any], part: Any = "train", using: Tokenizer = tokenizer, **data: Any) -> PromptStream:
        whole = {"sources": sources, "cache": tmp_path / "cache", **data}
        return open_prompts(Settings.model_validate({"policy": {"config": tmp_path}, "data": whole}), using, part)

    return open_it


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def arithmetic(**changes: Any) -> dict[str, Any]:
    return {"path": "task:arithmetic", "options": {"rows": 40}, **changes}


# -- sources -----------------------------------------------------------------------------------------------------------


def write_rows(kind: str, folder: Path) -> str:
    """ROWS as a file of this kind, a folder, or a module; returns the source's path."""
    rows = datasets.Dataset.from_list([{name: row[name] for name in ("prompt", "solution", "limit")} for row in ROWS])
    path = str(folder / f"data.{kind}")
    match kind:
        case "jsonl" | "jsonl.gz":
            rows.to_json(path, compression="gzip" if kind.endswith("gz") else None)
        case "csv":
            rows.to_csv(path)
        case "tsv":
            rows.to_csv(path, sep="\t")
        case "parquet":
            rows.to_parquet(path)
        case "folder":
            datasets.DatasetDict({"train": rows}).save_to_disk(path)
        case "function":
            (folder / "my_rows.py").write_text(f"def rows(start=0):\n    yield from {ROWS!r}[start:]\n")
            return "my_rows:rows"
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "folder", "function"])
def test_every_kind_of_source_gives_the_same_prompts(
    kind: str, tmp_path: Path, opened: Open, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_rows", None)
    importlib.invalidate_caches()
    source = {"path": write_rows(kind, tmp_path), "name": "own", "fields": {"truth": "solution"}, "max_new_tokens": "limit"}
    stream = opened(source, shuffle=False)
    for row, draw in zip(ROWS, stream.take(23), strict=True):
        prompt = draw.prompt
        assert prompt.key == f"own/{draw.position}"
        assert (
            tokenizer.decode(prompt.tokens.tolist()) == f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert prompt.messages == ({"role": "user", "content": row["prompt"]},)
        assert str(prompt.fields["truth"]) == row["solution"] and prompt.max_new_tokens == row["limit"]
    assert stream.take(1)[0].prompt.key == "own/0" and stream.at(23).epoch == 1
    if kind == "function":
        late = opened(source | {"options": {"start": 20}}, shuffle=False)
        assert len(late) == 3 and late.at(0).prompt.messages[0]["content"] == ROWS[20]["prompt"]


def test_a_pattern_names_several_files(tmp_path: Path, opened: Open) -> None:
    for part in range(3):
        (tmp_path / f"part{part}.jsonl").write_text(json.dumps({"prompt": f"from {part}"}) + "\n")
    stream = opened({"path": f"{tmp_path}/part*.jsonl"}, shuffle=False)
    assert [(draw.prompt.key, draw.prompt.messages[0]["content"]) for draw in stream.once()] == [
        (f"partall/{part}", f"from {part}") for part in range(3)
    ]


def test_local_files_are_read_without_a_word_to_the_network(opened: Open, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    assert len(opened({"path": str(rows)})) == 23 and len(opened(arithmetic())) == 40


def test_rows_are_mapped_from_disk_and_tokenised_once(
    opened: Open, rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(rows)}
    first = opened(source).at(5).prompt.tokens
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("tokenised again"))
    again = opened(source)
    assert np.array_equal(again.at(5).prompt.tokens, first)
    for held in (again.sources[0]._source.rows, again.sources[0]._tokenised):
        assert held.cache_files and all(Path(file["filename"]).exists() for file in held.cache_files)
    with pytest.raises(pytest.fail.Exception):
        opened(source, system="be brief")  # another rendering is another tokenisation


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("difficulty", [1, 3, 10])
def test_tasks_ask_what_their_answers_answer(task: str, difficulty: int) -> None:
    found = list(task_rows(task, TaskOptions(rows=60, difficulty=difficulty)))
    assert found == list(task_rows(task, TaskOptions(rows=60, difficulty=difficulty)))
    assert found != list(task_rows(task, TaskOptions(rows=60, difficulty=difficulty, seed=1)))
    for row in found:
        match task:
            case "arithmetic":
                asked = re.fullmatch(r"What is ([\d +*-]+)\? Answer with the number alone\.", row["prompt"])
                assert asked and str(eval(asked[1])) == row["answer"]
            case "sorting":
                numbers = re.findall(r"\d+", row["prompt"])
                assert row["answer"].split() == sorted(numbers, key=int) and len(numbers) == 2 + 2 * difficulty
            case "countdown":
                assert re.fullmatch(r"[\d ()+*-]+", row["answer"]) and eval(row["answer"]) == row["target"] > 0
                assert sorted(map(int, re.findall(r"\d+", row["answer"]))) == sorted(row["numbers"])
                assert str(row["target"]) in row["prompt"]
            case "digits":
                assert row["answer"] == "".join(sorted(row["prompt"])) and len(row["prompt"]) == 3 + difficulty
                assert row["demonstration"] in (row["answer"], row["answer"][::-1], row["prompt"])


def test_difficulty_makes_tasks_longer() -> None:
    for task in TASKS:
        means = [
            np.mean([len(row["prompt"]) for row in task_rows(task, TaskOptions(rows=50, difficulty=difficulty))])
            for difficulty in (1, 4, 7, 10)
        ]
        assert sorted(set(means)) == means, task


# -- what the model sees -----------------------------------------------------------------------------------------------


def test_templates_switches_and_system_prompts(opened: Open, tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    own_system = [{"role": "system", "content": "own"}, *talk]
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"talk": talk, "q": "1+1"}) + "\n" + json.dumps({"talk": own_system, "q": "1+2"}) + "\n")

    def texts(source: dict[str, Any], using: Tokenizer = tokenizer, **data: Any) -> list[str]:
        stream = opened({"path": str(path), **source}, shuffle=False, using=using, **data)
        return [using.decode(draw.prompt.tokens.tolist()) for draw in stream.take(2)]

    turns = "user\na", "assistant\nb", "user\nc"
    said = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns) + "<|im_start|>assistant\n"
    assert texts({"messages": "talk"}) == [said, f"<|im_start|>system\nown<|im_end|>\n{said}"]
    heads = [f"<|im_start|>system\n{name}<|im_end|>\n" for name in ("all", "own")]
    assert texts({"messages": "talk"}, system="all") == [heads[0] + said, heads[1] + said]
    assert texts({"messages": "talk", "system": ""}, system="all")[0] == said
    assert texts({"messages": "talk"}, chat_template_kwargs={"enable_thinking": False})[0] == f"{said}<think>\n\n</think>\n\n"
    worded = texts({"wording": "{q} = {{?}}"}, template="none")
    assert worded == ["<|endoftext|>1+1 = {?}", "<|endoftext|>1+2 = {?}"]  # plain text is begun as the model knows it
    own = Tokenizer(tokenizer.path, chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert texts({"messages": "talk"}, using=own)[0] == "[a][b][c]"


def test_pieces_of_tokens_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    for text in ("the user asks 1+1", "größer → 漢字 🙂!", "<|im_start|>user\nthe number"):
        ids = tokenizer.encode([text], special=False)[0]
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
    broken = tokenizer.encode(["漢"], special=False)[0][:-1]
    assert "\ufffd" in "".join(tokenizer.pieces(broken))


# -- order -------------------------------------------------------------------------------------------------------------


def test_the_same_prompts_come_on_any_number_of_ranks_and_from_any_position(opened: Open, rows: Path) -> None:
    def sources() -> PromptStream:
        return opened({"path": str(rows), "weight": 0.7}, arithmetic(weight=0.3), seed=3)

    whole = [(draw.position, draw.epoch, draw.prompt.key) for draw in sources().take(120)]
    assert len({(epoch, key) for _, epoch, key in whole}) == 120  # nothing twice in an epoch
    assert [key.split("/")[0] for _, _, key in whole].count("rows") == 84
    for ranks in (1, 2, 3, 8):
        streams = [sources() for _ in range(min(ranks, 3))]
        for rank, stream in enumerate(streams):
            own = [draw for count in (50, 1, 69) for draw in stream.take(count, rank=rank, ranks=ranks)]
            assert [(draw.position, draw.epoch, draw.prompt.key) for draw in own] == [
                one for one in whole if one[0] % ranks == rank
            ]
    for position in (1, 37, 84, 119):
        left = sources()
        left.take(position)
        state = json.loads(json.dumps(left.state()))
        resumed = sources()
        resumed.load_state(state)
        drawn = [(draw.position, draw.epoch, draw.prompt.key) for draw in resumed.take(120 - position)]
        assert drawn == whole[position:]


def test_a_position_of_other_prompts_is_refused(opened: Open, rows: Path) -> None:
    state = opened({"path": str(rows)}, seed=3).state()
    for stream, name in (
        (opened({"path": str(rows)}, seed=4), "seed"),
        (opened({"path": str(rows)}, seed=3, shuffle=False), "shuffle"),
        (opened({"path": str(rows)}, seed=3, max_prompt_tokens=25), "rows"),
        (opened({"path": str(rows), "weight": 2}, arithmetic(weight=1), seed=3), "rows"),
    ):
        with pytest.raises(DataError, match=f"saved position belongs to {name} = .*and now it is"):
            stream.load_state(state)


def test_without_weights_all_sources_last_equally_long(opened: Open, rows: Path) -> None:
    stream = opened({"path": str(rows)}, arithmetic())
    drawn = stream.take(63)
    assert len({draw.prompt.key for draw in drawn}) == 63 and {draw.epoch for draw in drawn} == {0}


def test_validation_rows_are_never_trained_on(opened: Open, rows: Path) -> None:
    train, validation = (opened({"path": str(rows)}, validation_share=0.2, part=part) for part in ("train", "validation"))
    held = [draw.prompt.key for draw in validation.once()]
    trained = {draw.prompt.key for draw in train.take(100)}
    assert len(held) == 5 and len(trained) == 18 and not trained & set(held)
    other = opened({"path": str(rows)}, validation_share=0.2, part="validation", seed=9)
    assert [draw.prompt.key for draw in other.once()] == held
    more = opened({"path": str(rows)}, validation_sources=[arithmetic(name="exam")], part="validation")
    assert [draw.prompt.key for draw in more.once()] == [f"exam/{row}" for row in range(40)]


# -- what can be wrong -------------------------------------------------------------------------------------------------


def test_long_and_empty_prompts_are_counted(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("short", "x" * 500, "  ", None, "fine", "y" * 400))
    )
    source = {"path": str(path)}
    stream = opened(source, max_prompt_tokens=100)
    assert dict(stream.counts) == {"rows": 6, "empty": 2, "too long": 2, "kept": 2}
    assert {draw.prompt.key for draw in stream.take(50)} == {"some/0", "some/4"}
    with pytest.raises(
        DataError, match=r"2 prompts are longer than data.max_prompt_tokens = 100; the first is row 1 with \d+ tokens"
    ):
        opened(source, max_prompt_tokens=100, too_long="error")
    with pytest.raises(DataError, match=r"no rows left for train: 6 rows, 2 empty, 4 too long, 0 kept\. Raise data.max_prompt"):
        opened(source, max_prompt_tokens=3)


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        (
            {"answer": "solutoin"},
            {},
            r"answer names the column solutoin, which is not there\. Did you mean solution\? Columns are",
        ),
        ({"prompt": "question"}, {}, "prompt names the column question.*Columns are prompt, solution, limit, level"),
        ({"fields": {"tests": "unit"}}, {}, "fields.tests names the column unit"),
        ({"wording": "{problem}"}, {}, r"wording \(\{problem\}\) names the column problem"),
        ({"wording": "{problem"}, {}, "wording cannot be read"),
        ({"prompt": "limit"}, {}, "row 0: the column limit holds int where text is expected"),
        ({"messages": "prompt"}, {}, "row 0: the column prompt must hold a list"),
        ({"path": "nowhere.jsonl"}, {}, r"nowhere.jsonl cannot be read: .*Give the path of a file that exists"),
        ({"path": "no_such_module:rows"}, {}, "no_such_module:rows cannot be read: No module named"),
        ({"path": "json:nothing"}, {}, "json:nothing cannot be read: module 'json' has no attribute 'nothing'"),
        ({"path": "task:arithmetics"}, {}, r"no such task\. Did you mean task:arithmetic\?"),
        ({"path": "task:sorting", "options": {"size": 3}}, {}, r"unknown option size\. Options are rows, difficulty, seed"),
        ({"path": "task:sorting", "options": {"difficulty": 11}}, {}, "difficulty = 11: expected a whole number from 1 to 10"),
        ({"options": {"rows": 3}}, {}, "options are for built-in tasks"),
        ({}, {"template": "none", "system": "be brief"}, "need a chat template, and data.template = none"),
    ],
)
def test_wrong_sources_are_told_with_their_fix(
    opened: Open, rows: Path, source: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened({"path": str(rows), **source}, **data)


def test_wrong_messages_columns_and_names(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"a": [{"role": "assistant", "content": "x"}], "b": [{"role": "user"}]}) + "\n")
    with pytest.raises(DataError, match="row 0: the conversation in the column a ends with the assistant's answer"):
        opened({"path": str(path), "messages": "a"})
    with pytest.raises(DataError, match="a message in the column b needs role and content as text"):
        opened({"path": str(path), "messages": "b"})
    with pytest.raises(DataError, match=r"two sources are called arithmetic: .*Set `name` of one"):
        opened(arithmetic(), arithmetic())
    with pytest.raises(DataError, match=r"there are no sources of train prompts\. Name one"):
        opened()
    with pytest.raises(DataError, match=r"no sources of validation prompts\. Set data.validation_share"):
        opened(arithmetic(), part="validation")
    datasets.Dataset.from_dict({"prompt": ["x"], "when": [b"bytes"]}).to_parquet(str(tmp_path / "bytes.parquet"))
    with pytest.raises(DataError, match="the column when holds binary, which cannot be handed to rewards"):
        opened({"path": str(tmp_path / "bytes.parquet"), "fields": {"when": "when"}})


def test_tokenizers_are_checked_against_model_and_template(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{}")

    def settings(**data: Any) -> Settings:
        return Settings.model_validate({"policy": {"config": model / "config.json"}, "data": data})

    assert open_tokenizer(settings(), vocab=VOCAB).decode([1]) == "<|im_start|>"
    with pytest.raises(DataError, match=r"token ids go up to \d+, and the model has 100 .*another model's tokenizer"):
        open_tokenizer(settings(), vocab=100)
    with pytest.raises(
        DataError, match=r"chat_template_kwargs.enable_thinkin: .* does not use it\. Did you mean enable_thinking\?"
    ):
        open_tokenizer(settings(chat_template_kwargs={"enable_thinkin": False}))
    with pytest.raises(DataError, match="no tokenizer can be loaded from it"):
        open_tokenizer(settings(tokenizer=str(tmp_path)))
    bare = str(write_tokenizer(tmp_path / "bare", chat_template=None))
    with pytest.raises(DataError, match=r"has no chat template\. Name a file"):
        open_tokenizer(settings(tokenizer=bare))
    open_tokenizer(settings(tokenizer=bare, template="none"))
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    open_tokenizer(settings(tokenizer=bare, chat_template=str(tmp_path / "own.jinja")))
    with pytest.raises(DataError, match="cannot be read"):
        open_tokenizer(settings(chat_template=str(tmp_path / "nowhere.jinja")))


def test_paths_of_sources_lie_beside_the_settings_file(tmp_path: Path, rows: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "policy: {config: x}\ndata:\n  sources:\n    - {path: rows.jsonl, weight: 2}\n    - {path: 'task:sorting'}\n"
    )
    settings = load_settings(config, [])
    assert [source.path for source in settings.data.sources] == [str(rows), "task:sorting"]
    with pytest.raises(SettingsError, match=r"data\.sources = .*expected a list"):
        load_settings(config, ["data.sources=[{pth: rows.jsonl}]"])


def test_sources_and_order_import_no_torch() -> None:
    program = (
        "import sys\nfrom megatron_rl.data import conversations, order, prompts, sources, tasks, tokenizer\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

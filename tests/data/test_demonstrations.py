"""Prompts with responses as sequences: what is learned, where it stands, and which rows are passed over or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from megatron_rl.config.errors import DataError
from megatron_rl.config.settings import Settings
from megatron_rl.data.demonstrations import Demonstrations, Demonstrator, held_out_sequences
from megatron_rl.data.prompts import open_prompts
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.data.toy_tokenizer import END, SIZE, byte_token, write_toy_tokenizer

USER, ASSISTANT = 2, 3
ROWS = [
    {"prompt": f"{row}?", "answer": "yes" if row % 2 else "no", "why": None if row == 4 else f"as {row}"} for row in range(6)
]

type Open = Callable[..., Demonstrations]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return Tokenizer(str(folder))


def settings_of(folder: Path, **source: Any) -> Settings:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sources = [{"path": str(path), "answer": "answer", "fields": {"why": "why"}, **source}]
    return Settings.model_validate({"policy": {"config": folder}, "data": {"sources": sources, "cache": folder / "cache"}})


@pytest.fixture
def opened(tmp_path: Path, tokenizer: Tokenizer) -> Open:
    def open_it(response: str = "{answer}", longest: int = 100, steps: int = 2, strict: bool = False, **source: Any) -> Any:
        demonstrator = Demonstrator(tokenizer, response, longest)
        prompts = open_prompts(settings_of(tmp_path, **source), tokenizer)
        return Demonstrations(prompts, demonstrator, batch=3, steps=steps, strict=strict)

    return open_it


def texts(demonstrations: Demonstrations, tokenizer: Tokenizer, step: int) -> list[str]:
    return [tokenizer.decode(sequence.tokens.tolist()) for sequence in demonstrations.step(step)]


def test_the_response_and_its_end_are_learned_and_nothing_else(opened: Open) -> None:
    (sequence, *_) = opened(response="so: {answer}").step(0)
    user, ending = sequence.tokens.tolist().index(END), len(sequence.tokens) - 1
    assert sequence.tokens[0] == USER and sequence.tokens[user + 1] == ASSISTANT and sequence.tokens[ending] == END
    learned = sequence.tokens[sequence.loss_mask].tolist()
    assert learned in [[*map(byte_token, f"so: {answer}".encode()), END] for answer in ("yes", "no")]
    assert sequence.loss_mask.tolist() == [place >= user + 2 for place in range(ending + 1)]


def test_steps_go_through_the_rows_and_do_not_depend_on_how_many_there_are(opened: Open, tokenizer: Tokenizer) -> None:
    short, long = opened(), opened(steps=7)
    assert sorted(texts(short, tokenizer, 0) + texts(short, tokenizer, 1)) == sorted(
        f"<|user|>{row['prompt']}<|end|><|assistant|>{row['answer']}<|end|>" for row in ROWS
    )
    assert [texts(long, tokenizer, step) for step in (0, 1)] == [texts(short, tokenizer, step) for step in (0, 1)]
    assert len(texts(long, tokenizer, 6)) == 3
    assert [sequence.index for sequence in long.step(6)] == [0, 1, 2]


def test_rows_that_cannot_be_learned_from_are_passed_over(opened: Open, tokenizer: Tokenizer) -> None:
    found = opened(response="{why}", steps=4)
    assert list(found.passed_over) == ["rows/4"] and "why is empty" in found.passed_over["rows/4"]
    seen = [text for step in range(4) for text in texts(found, tokenizer, step)]
    assert len(seen) == 12 and not any("4?" in text for text in seen)
    assert len(set(seen[:5])) == 5 and set(seen[:5]) == set(seen[5:10])  # whole epochs of what is left
    tight = opened(longest=7 + 1, steps=1)  # user, two of the question, end, assistant, "no", end
    assert all("yes" not in text for text in texts(tight, tokenizer, 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"response": "{solution}"}, "prompts of rows have no field solution (they have answer, why). Map it in data.sources"),
        ({"response": "{answer"}, "supervised.response = {answer: it cannot be read"),
        ({"response": "{0}"}, "{0} is no field"),
        ({"response": "{why}", "strict": True}, "rows/4 cannot be learned from: no response: why is empty"),
        ({"longest": 8, "strict": True}, "9 tokens with its response, and a sequence has 8 at most"),
        ({"longest": 3}, "no row can be learned from"),
        ({"answer": "solution"}, "answer names the column solution, which is not there"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_learned(opened: Open, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as refusal:
        opened(steps=6, **wrong)
    assert message in str(refusal.value)


def test_held_out_rows_are_no_rows_that_are_learned_from(tmp_path: Path, tokenizer: Tokenizer) -> None:
    settings = settings_of(tmp_path)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"validation_share": 0.5})})
    demonstrator = Demonstrator(tokenizer, "{why}", 100)
    learned = Demonstrations(open_prompts(settings, tokenizer), demonstrator, batch=3, steps=1)
    held = held_out_sequences(open_prompts(settings, tokenizer, "validation"), demonstrator, most=9)
    assert 2 <= len(held) <= 3
    assert not {tuple(sequence.tokens) for sequence in held} & {tuple(sequence.tokens) for sequence in learned.step(0)}
    assert len(held_out_sequences(open_prompts(settings, tokenizer, "validation"), demonstrator, most=1)) == 1


# -- the toy tokenizer ---------------------------------------------------------------------------------------------------


@given(text=some.text())
def test_any_text_goes_through_the_toy_tokenizer_unchanged(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text], special=True)
    assert tokenizer.decode(ids) == text
    if "<|" not in text:
        assert ids == [byte_token(byte) for byte in text.encode()]
    assert all(token < SIZE for token in ids)


def test_roles_are_single_tokens_and_no_text_for_rewards(tokenizer: Tokenizer) -> None:
    rendered = tokenizer.render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], {})
    (ids,) = tokenizer.encode([rendered], special=False)
    assert ids == [1, byte_token(ord("s")), END, USER, byte_token(ord("u")), END, ASSISTANT]
    assert tokenizer.text(ids) == "su" and tokenizer.end == END

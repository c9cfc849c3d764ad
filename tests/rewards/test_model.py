"""The reward model: weighted components, each sample by itself, whatever a reward does; and users' own functions."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.reward_settings import RewardPart, ScoringSettings
from megatron_rl.rewards.base import Scored
from megatron_rl.rewards.model import Grader, RewardModel, policy_text
from megatron_rl.rewards.registry import build
from megatron_rl.rollout.strategies.base import Judge
from megatron_rl.types import Sample
from tests.rewards.samples import decode, prompt, sample, scored

ONE = ScoringSettings(workers=1)
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def own(name: str, **options: Any) -> dict[str, Any]:
    return {"name": f"tests.rewards.own:{name}", "as": name, "options": options}


# -- the sum -----------------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_named_components() -> None:
    parts = [
        {"name": "exact", "weight": 2.0},
        {"name": "numeric", "weight": -0.5, "as": "digits"},
        {"name": "numeric", "weight": 0.0, "as": "measured"},
        own("length", arguments={"scale": 4.0}) | {"weight": 0.25},
    ]
    right, near, wrong = asyncio.run(scored(parts, {"answer": "42"}, "42", "it is 42", "41 "))
    assert right == Scored({"exact": 1.0, "digits": 1.0, "measured": 1.0, "length": 0.5}, 2 - 0.5 + 0.125)
    assert near == Scored({"exact": 0.0, "digits": 1.0, "measured": 1.0, "length": 2.0}, -0.5 + 0.5)
    assert wrong == Scored({"exact": 0.0, "digits": 0.0, "measured": 0.0, "length": 0.75}, 0.1875)


def test_a_sample_takes_its_score_and_keeps_what_it_had() -> None:
    before = sample("x")
    after = Scored({"math": 1.0}, 0.5, "wrong").onto(before)
    assert (after.rewards, after.reward, after.failure) == ({"math": 1.0}, 0.5, "wrong")
    assert after.tokens is before.tokens and before.reward == 0 and before.failure is None
    again = Scored({"format": 1.0}, 0.1).onto(after)
    assert again.rewards == {"math": 1.0, "format": 1.0} and again.failure == "wrong"


def test_a_grader_gives_samples_their_rewards_in_order() -> None:
    async def grade() -> list[Sample]:
        async with RewardModel(build([RewardPart(name="numeric", weight=2.0)]), ONE, decode) as model:
            grader: Judge = Grader(model)
            return list(await grader.score(prompt(answer=7), [sample("7"), sample("8"), sample("is 7")]))

    assert [(each.reward, dict(each.rewards)) for each in asyncio.run(grade())] == [
        (2, {"numeric": 1}),
        (0, {"numeric": 0}),
        (2, {"numeric": 1}),
    ]


def test_no_components_are_a_reward_of_zero() -> None:
    assert asyncio.run(scored([], {}, "x")) == [Scored({}, 0.0)]


# -- what is judged ----------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4), st.text("xyz", max_size=3))
def test_only_what_the_policy_wrote_is_judged(turns: list[str], environment: str) -> None:
    episode = sample(*turns, environment=environment)
    assert policy_text(episode, decode, "last_turn") == turns[-1]
    assert policy_text(episode, decode, "all_turns") == "".join(turns)


def test_a_turn_that_lived_through_an_update_is_whole() -> None:
    whole = sample("abcdef")
    question, response = whole.segments
    parts = [question]
    for start, stop, version in ((response.start, 4, 1), (4, 6, 2), (6, response.stop, 3)):
        parts.append(type(response)(start, stop, "policy", version, 0))
    split = type(whole)(whole.tokens, whole.log_probs, tuple(parts), "stop")
    assert policy_text(split, decode, "last_turn") == "abcdef"


def test_a_response_of_nothing_is_an_empty_text() -> None:
    empty = type(sample("x"))(np.array([1, 2]), np.zeros(2, np.float32), sample("x").segments[:1], "length")
    assert policy_text(empty, decode, "last_turn") == ""


# -- what fails, fails one sample ----------------------------------------------------------------------------------------

HASTY, PATIENT = 0.5, 120.0  # seconds: for what only the clock ends, and for what ends otherwise on a busy machine too
COMPUTED = {
    "raise": "KeyError: 'wrong\\nkey'",
    "exit": "its worker process ended with 3",
    "die": "its worker process ended with 4",
    "nan": "a reward must be a finite number, this is nan",
    "text": "a reward must be a finite number, this is '1'",
    "none": "a reward must be a finite number, this is None",
    "memory": "MemoryError",
}
AWAITED = {
    "raise": "KeyError: 'wrong\\nkey'",
    "exit": "SystemExit: 3",
    "cancel": "CancelledError",
    "nan": "a reward must be a finite number, this is nan",
    "timeout": "TimeoutError: of its own",
}


async def among_good_ones(name: str, bad: dict[str, str]) -> None:
    components = build([RewardPart.model_validate(own(each, timeout=PATIENT)) for each in (name, "length")])
    texts = [text for each in bad for text in ("good", each)]
    async with RewardModel(components, ScoringSettings(workers=2, failure_reward=-3.0), decode) as model:
        answers = await model.score(prompt(), [sample(text) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        if text == "good":
            assert answer == Scored({name: 1.0, "length": 4.0}, 5.0)
        else:
            assert answer == Scored({"length": float(len(text))}, -3.0, f"{name}: {bad[text]}")
    assert model.scored == len(texts) and dict(model.failures) == {name: len(bad)}


def test_what_a_function_does_in_a_worker_is_one_samples_failure() -> None:
    asyncio.run(among_good_ones("misbehave", COMPUTED))


def test_what_an_async_function_does_is_one_samples_failure() -> None:
    asyncio.run(among_good_ones("misbehave_waiting", AWAITED))


def test_what_never_ends_is_stopped_and_the_rest_is_judged() -> None:
    parts = [own("misbehave", timeout=HASTY), own("misbehave_waiting", timeout=HASTY), own("length", timeout=PATIENT)]
    for answer, text in zip(asyncio.run(scored(parts, {}, "sleep", "loop")), ("sleep", "loop"), strict=True):
        assert answer.rewards["length"] == len(text) and answer.failure is not None
        assert answer.failure.startswith("misbehave: took more than 0.5 s and was stopped")
        assert answer.failure.endswith("; misbehave_waiting: took more than 0.5 s") == (text == "sleep")


def test_output_and_input_of_a_function_are_not_the_workers() -> None:
    answers = asyncio.run(scored([own("misbehave")], {}, "print", "input", "good"))
    assert [answer.reward for answer in answers] == [1, 0, 1]


def test_a_text_that_cannot_be_decoded_is_a_failure() -> None:
    def broken(ids: NDArray[np.int64]) -> str:
        raise ValueError("no such token")

    async def score() -> list[Scored]:
        async with RewardModel(build([]), ONE, broken) as model:
            return await model.score(prompt(), [sample("x")])

    assert asyncio.run(score()) == [Scored({}, 0.0, "its text cannot be read: ValueError: no such token")]


def test_mathematics_that_never_ends_is_stopped_and_the_next_is_judged() -> None:
    parts = [{"name": "math", "options": {"timeout": 2.0}}]
    endless = r"\boxed{" + "^{".join(["9"] * 7) + "}" * 7
    answers = asyncio.run(scored(parts, {"answer": "7"}, endless, r"\boxed{7}", r"\boxed{8}"))
    assert answers[0].failure == "math: took more than 2 s and was stopped"
    assert [answer.reward for answer in answers] == [0, 1, 0] and answers[1].failure is None


def test_a_pattern_that_never_ends_is_stopped_and_the_loop_goes_on() -> None:
    async def score() -> tuple[list[Scored], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        clock = asyncio.create_task(tick())
        parts = [{"name": "regex", "options": {"pattern": "(a+)+b", "timeout": 1.0}}]
        answers = await scored(parts, {}, "a" * 64)
        clock.cancel()
        return answers, ticks

    answers, ticks = asyncio.run(score())
    assert answers[0].failure == "regex: took more than 1 s and was stopped"
    assert ticks > 5  # a blocked loop would have had none


# -- workers -------------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_that_are_killed_are_replaced_and_none_is_left() -> None:
    async def score() -> tuple[list[float], set[int]]:
        async with RewardModel(build([RewardPart.model_validate(own("length"))]), ScoringSettings(workers=2), decode) as model:
            pids: set[int] = set()
            rewards = []
            for _ in range(2):
                found = {worker.process.pid for worker in model.pool.workers if worker.process is not None}
                pids |= found
                rewards += [answer.reward for answer in await model.score(prompt(), [sample("abc")] * 4)]
                for pid in found:
                    os.kill(pid, signal.SIGKILL)
                failed = await model.score(prompt(), [sample("abc")] * 2)
                assert all(answer.failure == "length: its worker process ended with -9" for answer in failed)
                rewards += [answer.reward for answer in await model.score(prompt(), [sample("abc")] * 4)]
            pids |= {worker.process.pid for worker in model.pool.workers if worker.process is not None}
            return rewards, pids

    rewards, pids = asyncio.run(score())
    assert rewards == [3.0] * 16 and len(pids) >= 4
    assert not any(map(alive, pids))


def test_being_cancelled_kills_what_was_being_computed() -> None:
    async def score() -> tuple[list[int], list[Scored]]:
        part = RewardPart.model_validate(own("misbehave"))
        async with RewardModel(build([part]), ONE, decode) as model:
            task = asyncio.create_task(model.score(prompt(), [sample("loop")]))
            await asyncio.sleep(0.3)
            pids = [worker.process.pid for worker in model.pool.workers if worker.process is not None]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not any(map(alive, pids))
            return pids, await model.score(prompt(), [sample("good")])

    pids, answers = asyncio.run(score())
    assert len(pids) == 1 and answers[0].reward == 1


def test_async_functions_run_at_once_up_to_their_bound() -> None:
    async def score() -> list[float]:
        part = RewardPart.model_validate(own("busy", concurrency=3))
        async with RewardModel(build([part]), ONE, decode) as model:
            answers = await model.score(prompt(marks=[]), [sample("x")] * 12)
        return [answer.reward for answer in answers]

    assert max(asyncio.run(score())) == 3


# -- functions of one's own ------------------------------------------------------------------------------------------------


def test_the_functions_of_the_docs_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    parts: list[dict[str, Any]] = [
        {"name": "my_rewards:brevity", "as": "short", "weight": 0.2, "options": {"arguments": {"scale": 100}}},
        {"name": "my_rewards:ask_a_service", "options": {"timeout": 5.0}},
    ]
    [answer] = asyncio.run(scored(parts, {"answer": "four"}, "It is four."))
    assert answer.rewards == {"short": pytest.approx(100 / 111), "my_rewards:ask_a_service": 1.0}
    assert answer.reward == pytest.approx(1 + 20 / 111)
    [unknown] = asyncio.run(scored(parts, {}, "It is four."))
    assert unknown.failure == "my_rewards:ask_a_service: ValueError: nothing is known about this prompt"
    [close] = asyncio.run(scored([{"name": "my_rewards:in_place"}], {"answer": "4321"}, "4312 "))
    assert close.reward == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    "part, message",
    [
        (own("lenght"), "tests/rewards/own.py has no lenght. Correct its name"),
        ({"name": "nowhere.at_all:reward"}, "cannot be loaded: No module named 'nowhere'"),
        (own("not_a_function"), "is a int; name a function"),
        (own("length", arguments={"scal": 2}), "cannot be called with (prompt, text, sample) and {'scal': 2}"),
        (own("length", scale=2), "tests.rewards.own:length has no such option. It has timeout, concurrency, arguments."),
    ],
)
def test_functions_that_cannot_work_are_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        build([RewardPart.model_validate(part)])
    assert message in str(refusal.value) and str(refusal.value).startswith("rewards[0]")

"""What strategies make of responses: which tokens are learned, what the policy reads, what goes on after an interruption."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_rl.rollout.chat import Chat
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.environment import Environment, Observation
from megatron_rl.rollout.environments.calculator import Calculator
from megatron_rl.rollout.replies import Generation, Span
from megatron_rl.rollout.strategies.base import Floor, Limits
from megatron_rl.rollout.strategies.episodes import Episodes
from megatron_rl.rollout.strategies.grouped import Grouped
from megatron_rl.rollout.strategies.igrpo import Improved
from megatron_rl.rollout.strategies.turns import TurnGroups
from megatron_rl.rollout.trajectory import Trajectory
from megatron_rl.types import Prompt, Sample
from tests.reference.tiny_checkpoint import END, saved_tokenizer, tiny_tokenizer
from tests.rollout.scripted import Grader, Writer, floor

CHAT = Chat(saved_tokenizer())
PROMPT = Prompt("p", np.array([5, 6, 7], np.int64), ({"role": "user", "content": "x"},))


class Says:
    """Answers with given texts, one after the other, each ended as the policy ends a turn."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.read: list[list[int]] = []  # the tokens it was asked with

    async def generate(self, tokens: NDArray[np.int64], sampling: Sampling, *, group: str) -> Generation:
        self.read.append(tokens.tolist())
        whole = [*tiny_tokenizer().encode(self.texts.pop(0)), END]
        written = np.array(whole[: sampling.max_new_tokens])
        count = len(written)
        finish = "stop" if count == len(whole) else "length"
        return Generation(written, np.full(count, -0.5, np.float32), (Span(0, count),), finish)  # type: ignore[arg-type]

    async def interrupt(self) -> None:
        raise AssertionError("nothing interrupts this")


def on(says: object, *, turns: int = 8, total: int = 2000) -> Floor:
    return Floor(says, Grader(), Sampling(64), Limits(64, total, turns))  # type: ignore[arg-type]


def check_cover(sample: Sample) -> None:
    stops = [0, *(segment.stop for segment in sample.segments)]
    assert [segment.start for segment in sample.segments] == stops[:-1] and stops[-1] == sample.length
    assert all(sample.log_probs[~sample.loss_mask] == 0)


def test_versions_within_a_response_are_segments() -> None:
    trajectory = Trajectory.begin(np.array([5, 6]))
    spans = (Span(3, 2), Span(4, 1))
    trajectory.respond(Generation(np.array([10, 11, 12]), np.zeros(3, np.float32), spans, "abort"))
    trajectory.respond(Generation(np.array([13, 14]), np.zeros(2, np.float32), (Span(4, 1), Span(5, 1)), "stop"))
    found = [(s.start, s.stop, s.author, s.version) for s in trajectory.sample("stop").segments]
    expected = [(0, 2, "prompt", None), (2, 4, "policy", 3), (4, 6, "policy", 4), (6, 7, "policy", 5)]
    assert found == expected
    again = Trajectory.resume(trajectory.sample("abort"))
    assert again.sample("abort").segments == trajectory.sample("abort").segments and again.turn_tokens == 5


def test_positions_keep_the_routing_of_who_sampled_there() -> None:
    def answer(tokens: list[int], positions: int, server: int) -> Generation:
        routing = np.full((positions, 2, 2), server, np.uint8) if server else None
        return Generation(np.array(tokens), np.zeros(len(tokens), np.float32), (Span(server, len(tokens)),), "abort", routing)

    trajectory = Trajectory.begin(np.array([5, 6]))
    trajectory.respond(answer([10, 11], positions=3, server=1))
    again = Trajectory.resume(trajectory.sample("abort"))
    again.respond(answer([12], positions=4, server=2))
    routing = again.sample("stop").routing
    assert routing is not None and routing[:, 0, 0].tolist() == [1, 1, 1, 2]
    again.respond(answer([13], positions=5, server=0))
    assert again.sample("abort").routing is None  # it would cover only a beginning


@pytest.mark.parametrize(
    ("own", "total", "finish", "tokens"), [(10, 200, "length", 10), (50, 20, "budget", 17), (50, 200, "stop", 37)]
)
def test_limits_and_why_a_response_ended(own: int, total: int, finish: str, tokens: int) -> None:
    writer = Writer(lambda _: 39)  # 36 tokens, then the end
    limited = floor(writer, response=own, total=total)
    (graded,) = asyncio.run(Grouped(3).run(PROMPT, "k", limited)).groups
    for sample in graded.samples:
        assert (sample.finish, int(sample.loss_mask.sum())) == (finish, tokens)
        check_cover(sample)
    own_limit = Prompt("p", PROMPT.tokens, max_new_tokens=4)
    (graded,) = asyncio.run(Grouped(1).run(own_limit, "k", floor(writer))).groups
    assert graded.samples[0].loss_mask.sum() == 4


def test_interrupted_responses_go_on_and_whole_ones_stay() -> None:
    async def run() -> None:
        writer = Writer(lambda tokens: 30 if len(tokens) == 3 else 60)
        here = floor(writer, response=100)
        running = asyncio.create_task(Grouped(2).run(PROMPT, "k", here))
        for _ in range(10):
            await asyncio.sleep(0)
        await here.interrupt()
        first = await running
        assert first.unfinished is not None and all(sample.finish == "abort" for sample in first.unfinished)
        writer.version, here.interrupted = 1, False
        second = await Grouped(2).run(PROMPT, "k", here, first.unfinished)
        for before, after in zip(first.unfinished, second.groups[0].samples, strict=True):
            assert (after.tokens[: before.length] == before.tokens).all()
            assert [s.version for s in after.segments] == [None, 0, 1] and after.segments[1].stop == before.length
            check_cover(after)

    asyncio.run(run())


def test_igrpo_learns_from_responses_that_follow_the_best_draft() -> None:
    says = Says("draft one", "draft two", "draft three", "better", "best")
    instruction = tiny_tokenizer().encode("Improve.")

    def with_draft(prompt: Prompt, draft: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([prompt.tokens, draft, instruction])

    (graded,) = asyncio.run(Improved(2, 3, with_draft).run(PROMPT, "k", on(says))).groups
    chosen = [*PROMPT.tokens.tolist(), *tiny_tokenizer().encode("draft three"), END, *instruction]  # graded by place: the last
    assert says.read == [PROMPT.tokens.tolist()] * 3 + [chosen] * 2
    assert graded.information == {"draft_reward": 2.0, "mean_draft_reward": 1.0}
    for sample, text in zip(graded.samples, ("better", "best"), strict=True):
        assert sample.prompt_length == len(chosen)
        assert sample.tokens[sample.loss_mask].tolist() == [*tiny_tokenizer().encode(text), END]
        check_cover(sample)


def test_calculator_episode_masks_what_the_tool_said() -> None:
    says = Says("let me see <calc>12*(3+4)</calc>", "it is 84")
    play = Episodes(1, Calculator, CHAT)
    (graded,) = asyncio.run(play.run(PROMPT, "k", on(says))).groups
    (sample,) = graded.samples
    check_cover(sample)
    assert [(s.author, s.turn) for s in sample.segments] == [("prompt", 0), ("policy", 0), ("environment", 0), ("policy", 1)]
    tool = sample.segments[2]
    text = tiny_tokenizer().decode(sample.tokens[tool.start : tool.stop])
    assert text == "\n<|im_start|>tool\n84<|im_end|>\n<|im_start|>assistant\n"  # what the template says after <|im_end|>
    learned = [*tiny_tokenizer().encode("let me see <calc>12*(3+4)</calc>"), END, *tiny_tokenizer().encode("it is 84"), END]
    assert sample.tokens[sample.loss_mask].tolist() == learned
    assert sample.finish == "stop" and says.read[1] == sample.tokens[: sample.segments[3].start].tolist()


def test_turns_tokens_and_budgets_end_episodes() -> None:
    def ended(turns: int, total: int) -> Sample:
        play = Episodes(1, Calculator, CHAT)
        says = Says(*["<calc>1+1</calc>"] * 5)
        return asyncio.run(play.run(PROMPT, "k", on(says, turns=turns, total=total))).groups[0].samples[0]

    assert (ended(2, 2000).finish, ended(2, 2000).segments[-1].turn) == ("budget", 1)
    short = ended(8, 40)
    assert short.finish == "budget" and short.length <= 40


@dataclass
class Moody(Environment):
    """Rewards its turns; breaks on demand, or answers differently each time."""

    breaks: bool = False
    moods: Callable[[], str] = lambda: "go on"

    async def reset(self, prompt: Prompt) -> None:
        self.seen = 0

    async def step(self, text: str) -> Observation:
        if self.breaks:
            raise OSError("the tool is gone")
        self.seen += 1
        reward = 0.25 * self.seen + len(text) / 1000
        return Observation(({"role": "tool", "content": self.moods()},), reward, done="end" in text)


def test_environment_rewards_and_failures_belong_to_their_sample() -> None:
    says = Says("a", "end")
    (graded,) = asyncio.run(Episodes(1, Moody, CHAT, reward_weight=2.0).run(PROMPT, "k", on(says))).groups
    total = 0.25 + 0.001 + 0.5 + 0.003
    assert graded.samples[0].rewards["environment"] == pytest.approx(total)
    assert graded.samples[0].reward == pytest.approx(2 * total)
    broken = Episodes(2, lambda: Moody(breaks=True), CHAT)
    (graded,) = asyncio.run(broken.run(PROMPT, "k", on(Says("a", "b")))).groups
    assert [sample.finish for sample in graded.samples] == ["error", "error"]
    assert all("Moody.step: OSError('the tool is gone')" in (sample.failure or "") for sample in graded.samples)


@pytest.mark.parametrize("same", [True, False])
def test_a_cut_episode_goes_on_after_the_turns_it_had(same: bool) -> None:
    moods = iter(["one", "one" if same else "two", "three", "four"])
    play = Episodes(1, lambda: Moody(moods=lambda: next(moods)), CHAT)

    async def run() -> tuple[Sample, Sample, Says]:
        trajectory = Trajectory.begin(PROMPT.tokens)
        first = Says("hello")
        trajectory.respond(await first.generate(PROMPT.tokens, Sampling(9), group="k"))
        trajectory.turn_rewards.append(0.25)
        trajectory.observe(CHAT.continuation([{"role": "tool", "content": next(moods)}], trajectory.response(0)))
        cut = trajectory.sample("abort")
        says = Says("the end") if same else Says("once more", "the end")
        finished = await play.run(PROMPT, "k", on(says), [cut])
        return cut, finished.groups[0].samples[0], says

    cut, sample, says = asyncio.run(run())
    check_cover(sample)
    assert says.read[0] == (cut.tokens if same else PROMPT.tokens).tolist()
    assert len(sample.turn_rewards) == 2 and sample.segments[-1].turn == 1


@pytest.mark.parametrize(("go_on_with", "history"), [("first", "a"), ("best", "longest of all")])
def test_turn_groups_compare_actions_from_one_history(go_on_with: str, history: str) -> None:
    says = Says("a", "longest of all", "bb", "c end", "dd end", "e end")
    play = TurnGroups(3, Moody, CHAT, go_on_with)  # type: ignore[arg-type]
    groups = asyncio.run(play.run(PROMPT, "k", on(says))).groups
    assert [graded.part for graded in groups] == ["turn0", "turn1"]
    before = [*PROMPT.tokens.tolist(), *tiny_tokenizer().encode(history), END]
    before += CHAT.continuation([{"role": "tool", "content": "go on"}], [END])
    assert says.read == [PROMPT.tokens.tolist()] * 3 + [before] * 3
    for sample, text in zip(groups[1].samples, ("c end", "dd end", "e end"), strict=True):
        check_cover_of_turn(sample, before, text)
        assert sample.reward == pytest.approx(0.5 + len(text) / 1000)  # each in a copy: all are its second step
    best = max(sample.reward for graded in groups for sample in graded.samples)
    assert all(graded.information == {"best_turn_reward": best} for graded in groups)


def check_cover_of_turn(sample: Sample, before: list[int], text: str) -> None:
    assert sample.tokens.tolist() == [*before, *tiny_tokenizer().encode(text), END]
    assert sample.tokens[sample.loss_mask].tolist() == [*tiny_tokenizer().encode(text), END]


def test_continuation_is_what_the_template_says_between_turns() -> None:
    """The whole conversation, rendered and its answer cut off, gives the same text, whether or not the policy ended it."""
    conversation = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
    ]
    tokenizer = tiny_tokenizer()
    whole = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    for after in ([*tokenizer.encode("yes"), END], tokenizer.encode("yes")):
        rest = tokenizer.decode(CHAT.continuation(conversation[2:], after))
        assert whole.endswith(tokenizer.decode(after) + rest)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("<calc>2**10 - 4/8</calc>", "1023.5"),
        ("<calc> -(7 // 2) % 5 </calc>", "2"),
        ("<calc>1/0</calc>", "error"),
        ("<calc>9**9**9</calc>", "error"),
        ("<calc>__import__('os').getpid()</calc>", "error"),
        ("<calc>(1).__class__</calc>", "error"),
        ("<calc>True + 1</calc>", "error"),
        ("<calc>" + "(" * 150 + "1" + ")" * 49 + "</calc>", "error"),
        ("<calc>" + "1+" * 200 + "1</calc>", "error"),
    ],
)
def test_calculator_computes_arithmetic_and_nothing_else(call: str, answer: str) -> None:
    seen = asyncio.run(Calculator().step(call))
    assert seen.messages[0]["content"].startswith(answer)

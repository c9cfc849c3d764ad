"""Steps are filled with every group exactly once, none older than allowed, whatever is cut off, thrown away or crashes."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.rollout.collector import Collected, Collector, Plan, Position
from megatron_rl.rollout.staleness import Staleness
from megatron_rl.rollout.strategies.base import Floor, Round, StrategyFailed
from megatron_rl.rollout.strategies.grouped import Grouped
from megatron_rl.types import Prompt, Sample
from tests.rollout.scripted import Counting, Grader, Shelf, Writer, floor


def lengths(seed: int) -> Writer:
    """Responses, and what follows when they are cut off, of 1 to 40 tokens, by chance."""
    chance = random.Random(seed)
    return Writer(lambda tokens: len(tokens) + chance.randrange(1, 40), seed)


def collector(writer: Writer, shelf: Shelf, plan: Plan, grader: Grader | None = None, **position: object) -> Collector:
    return Collector(Counting(), Grouped(2), floor(writer, grader, response=1000, total=2000), shelf, plan, **position)  # type: ignore[arg-type]


async def train(sampler: Collector, writer: Writer, steps: range) -> list[Collected]:
    """Collect and update in turn."""
    reports = []
    for step in steps:
        reports.append(await sampler.collect(step))
        writer.version = step + 1
        sampler.updated(step + 1)
        for _ in range(random.Random(step).randrange(30)):  # learning takes its time
            await asyncio.sleep(0)
    return reports


@given(per_step=st.integers(1, 9), bound=st.integers(0, 4), updates=st.integers(0, 20))
def test_staleness_keeps_its_bound_and_wastes_nothing(per_step: int, bound: int, updates: int) -> None:
    """Begin all that may: the last group begun is learned exactly `bound` updates later, and learning never waits forever."""
    staleness = Staleness(per_step, bound)
    begun = 0
    for version in range(updates + 1):
        room = staleness.may_begin(begun, version)
        begun += room
        assert staleness.step_of(begun - 1) - version == bound
        assert begun >= (version + 1) * per_step
    assert staleness.may_begin(begun, updates) == 0


@settings(deadline=None, max_examples=40)
@given(ahead=st.integers(0, 3), groups=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_in_order_steps_are_full_in_order_and_fresh(ahead: int, groups: int, seed: int) -> None:
    async def run() -> None:
        writer, shelf = lengths(seed), Shelf()
        sampler = collector(writer, shelf, Plan(groups, ahead))
        await train(sampler, writer, range(5))
        await sampler.close()
        keys = [group.key for step in range(5) for group in shelf.sealed[step]]
        assert keys == [f"p{draw}@{draw}" for draw in range(5 * groups)]
        for step, sealed in shelf.sealed.items():
            versions = [segment.version for group in sealed for sample in group.samples for segment in sample.segments[1:]]
            assert all(version is not None and 0 <= step - version <= ahead for version in versions)

    asyncio.run(run())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), ahead=st.integers(0, 2))
def test_dynamic_sampling_replaces_equal_rewards_and_is_bounded(seed: int, ahead: int) -> None:
    async def run(share: float, tries: int) -> tuple[Shelf, list[Collected]]:
        writer, shelf = lengths(seed), Shelf()
        grader = Grader(lambda prompt, index: float(index) if hash((seed, prompt.key)) % 100 < share * 100 else 1.0)
        sampler = collector(writer, shelf, Plan(4, ahead, dynamic=True, tries=tries), grader)
        reports = await train(sampler, writer, range(4))
        await sampler.close()
        return shelf, reports

    shelf, reports = asyncio.run(run(0.5, 1000))
    for sealed in shelf.sealed.values():
        assert len(sealed) == 4
        assert all(group.samples[0].reward != group.samples[1].reward for group in sealed)
    assert sum(report.thrown for report in reports) == len(set(shelf.discarded)) == len(shelf.discarded)
    shelf, reports = asyncio.run(run(0.0, 3))  # nothing teaches anything: it must end all the same
    assert [len(sealed) for sealed in shelf.sealed.values()] == [4] * 4
    assert all(report.thrown == 2 * 4 for report in reports)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 4), factor=st.sampled_from([1.0, 1.5, 3.0]))
def test_partial_responses_go_on_in_the_next_step(seed: int, groups: int, factor: float) -> None:
    async def run() -> None:
        writer, shelf = lengths(seed), Shelf()
        sampler = collector(writer, shelf, Plan(groups, partial=True, over_sampling=factor))
        reports = await train(sampler, writer, range(6))
        keys = [group.key for sealed in shelf.sealed.values() for group in sealed]
        assert all(len(sealed) == groups for sealed in shelf.sealed.values())
        assert max(Counter(keys).values()) == 1
        for step, sealed in shelf.sealed.items():
            for sample in (sample for group in sealed for sample in group.samples):
                assert sample.finish == "stop"
                assert [segment.start for segment in sample.segments[1:]] == [s.stop for s in sample.segments[:-1]]
                assert sample.segments[-1].stop == sample.length
                versions = [segment.version or 0 for segment in sample.segments[1:]]
                assert versions == sorted(versions) and versions[-1] <= step
                assert sample.loss_mask.sum() == sample.length - 3
        if factor == 3.0 and groups > 1:
            assert sum(report.cut for report in reports) > 0

    asyncio.run(run())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), ahead=st.integers(0, 2), partial=st.booleans(), after=st.integers(0, 300))
def test_a_crash_loses_and_doubles_nothing(seed: int, ahead: int, partial: bool, after: int) -> None:
    """Sampling is killed anywhere and resumed from the last step that was reported: no prompt twice, none left out."""

    async def run() -> None:
        writer, shelf = lengths(seed), Shelf()
        plan = Plan(3, 0 if partial else ahead, partial=partial)
        done: list[Collected] = []

        async def life(step: int, position: Position) -> None:
            sampler = collector(writer, shelf, plan, step=step, position=position)
            writer.version = step
            for number in range(step, 5):
                done.append(await sampler.collect(number))
                writer.version = number + 1
                sampler.updated(number + 1)

        first = asyncio.create_task(life(0, Position()))
        for _ in range(after):
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await writer.interrupt()
        position = done[-1].position if done else Position()
        await life(len(done), position)
        keys = [key for report in done for key in report.keys]
        assert len(keys) == 5 * 3 and max(Counter(keys).values()) == 1
        if not partial:
            assert keys == [f"p{draw}@{draw}" for draw in range(15)]

    asyncio.run(run())


def test_prompts_that_fail_are_replaced_and_counted() -> None:
    class Failing:
        async def run(self, prompt: Prompt, key: str, floor: Floor, unfinished: Sequence[Sample] = ()) -> Round:
            if int(prompt.key[1:]) % 3 == 0:
                raise StrategyFailed("no environment")
            return await Grouped(2).run(prompt, key, floor, unfinished)

    async def run() -> Collected:
        writer, shelf = lengths(0), Shelf()
        sampler = Collector(Counting(), Failing(), floor(writer), shelf, Plan(4))
        return await sampler.collect(0)

    report = asyncio.run(run())
    assert report.failed >= 2 and len(report.keys) == 4
    assert not any(int(key[1:].split("@")[0]) % 3 == 0 for key in report.keys)


def test_a_step_beyond_the_bound_is_refused() -> None:
    async def run() -> None:
        sampler = collector(lengths(0), Shelf(), Plan(2))
        with pytest.raises(ValueError, match="cannot be sampled after 0 updates with ahead = 0"):
            await sampler.collect(1)
        await sampler.close()

    asyncio.run(run())

"""Responses end where they end, whenever updates of weights come between."""

import asyncio
from dataclasses import replace

from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.replies import Generation
from tests.rollout.talk import PROMPT
from tests.rollout.test_pool import decode, with_pool
from tests.servers import TinyServer


def test_a_response_ends_with_its_last_token_also_when_that_is_aborted(tiny_server: TinyServer) -> None:
    """Aborts that strike as the token which ends a response is drawn: it ends there all the same. Many, so that some do."""

    async def end(pool: Pool) -> tuple[list[int], list[Generation]]:
        greedy = Sampling(60, temperature=0.0)
        free = (await pool.generate(PROMPT, replace(greedy, ignore_end=True), group="g")).tokens.tolist()
        place = next(place for place in range(20, 60) if free[place] not in free[:place])
        ends = replace(greedy, stop_tokens=(free[place],))
        running = []
        for version in range(1, 13):
            running += [asyncio.create_task(pool.generate(PROMPT, ends, group="g")) for _ in range(4)]
            await asyncio.sleep(0.02)
            await pool.fleet.update(version, lambda client, version=version: client.set_version(version))  # type: ignore[misc]
        return free[: place + 1], await asyncio.gather(*running)

    expected, found = with_pool(tiny_server, end)
    assert {(response.finish, *response.tokens.tolist()) for response in found} == {("stop", *expected)}


def test_a_stop_text_is_found_across_an_update(tiny_server: TinyServer) -> None:
    """Greedy responses are cut at the same place, whether or not an update (to the same weights) came between."""

    async def stop(pool: Pool) -> tuple[Generation, list[Generation]]:
        greedy = Sampling(60, temperature=0.0, ignore_end=True)
        free = await pool.generate(PROMPT, greedy, group="g")
        # Plain letters: what stands for half a character depends on where decoding begins.
        texts = (decode(free.tokens[place : place + 3].tolist()) for place in range(30, 56))
        text = next(text for text in texts if text.isascii())
        running = [asyncio.create_task(pool.generate(PROMPT, replace(greedy, stop=(text,)), group="g")) for _ in range(4)]
        for version in range(1, 6):
            await asyncio.sleep(0.03)
            await pool.fleet.update(version, lambda client, version=version: client.set_version(version))  # type: ignore[misc]
        return free, await asyncio.gather(*running)

    free, stopped = with_pool(tiny_server, stop)
    length = len(stopped[0].tokens)
    assert length < 60
    for response in stopped:
        assert response.finish == "stop"
        assert response.tokens.tolist() == free.tokens[:length].tolist()
        assert sum(span.length for span in response.spans) == length

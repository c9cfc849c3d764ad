"""The client against a real server: numbers as transformers has them, updates token by token, and what must not kill it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.client import Client, PauseMode, Sampling, new_request
from megatron_rl.rollout.connection import Patience
from megatron_rl.rollout.errors import Refused, TimedOut, Unreachable
from megatron_rl.rollout.replies import Generation, Piece, gather
from megatron_rl.rollout.server import free_ports
from tests.rollout.talk import PROMPT, flush, reference_log_probs, talk
from tests.servers import SHAPE, VOCABULARY, TinyServer

CLOSE = 1e-4  # log-probs in float32, by different kernels
LONG = Sampling(max_new_tokens=1500, ignore_end=True, piece=1)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_the_sampling_temperature(tiny_server: TinyServer, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=temperature, ignore_end=True, piece=7)
    response = talk(tiny_server, lambda client: client.generate(PROMPT, sampling))
    tokens = [*PROMPT, *response.tokens.tolist()]
    expected = reference_log_probs(tiny_server.model, tokens, temperature)[len(PROMPT) :]
    assert len(response.tokens) == 40 and response.finish == "length"
    np.testing.assert_allclose(response.log_probs, expected, atol=CLOSE)


def test_a_score_is_that_of_transformers(tiny_server: TinyServer) -> None:
    tokens = [*np.random.default_rng(0).integers(0, VOCABULARY, 60).tolist(), 0, VOCABULARY - 1, VOCABULARY - 2]
    scored = talk(tiny_server, lambda client: client.score(tokens))
    np.testing.assert_allclose(scored, reference_log_probs(tiny_server.model, tokens), atol=CLOSE)


def test_routing_names_the_experts_that_transformers_chooses(tiny_server: TinyServer) -> None:
    sampling = Sampling(max_new_tokens=20, ignore_end=True)
    response = talk(tiny_server, lambda client: client.generate(PROMPT, sampling, routing=SHAPE))
    model = AutoModelForCausalLM.from_pretrained(tiny_server.model, dtype=torch.float32).eval()
    tokens = torch.tensor([[*PROMPT, *response.tokens.tolist()]])
    with torch.no_grad():
        router_logits = model(tokens, output_router_logits=True).router_logits
    assert response.routing is not None and response.routing.dtype == np.uint8
    for layer, logits in enumerate(router_logits):  # [tokens, experts]
        chosen = logits.topk(SHAPE.chosen).indices.sort(-1).values[:-1]
        np.testing.assert_array_equal(np.sort(response.routing[:, layer], axis=-1), chosen.numpy())


def test_stop_tokens_end_a_response_and_stay_in_it(tiny_server: TinyServer) -> None:
    async def stop(client: Client) -> tuple[Generation, Generation]:
        greedy = await client.generate(PROMPT, Sampling(30, temperature=0, ignore_end=True))
        stop_token = int(greedy.tokens[10])
        return greedy, await client.generate(PROMPT, Sampling(30, temperature=0, stop_tokens=(stop_token,)))

    greedy, stopped = talk(tiny_server, stop)
    end = greedy.tokens.tolist().index(int(stopped.tokens[-1])) + 1
    assert stopped.finish == "stop"
    assert stopped.tokens.tolist() == greedy.tokens.tolist()[:end]


def test_ends_that_are_ruled_out_change_the_log_probs(tiny_server: TinyServer) -> None:
    """SGLang masks stop tokens until `min_new_tokens`, and reports log-probs of what is left: hence the settings' warning."""
    ends = list(range(0, VOCABULARY, 2))
    sampling = Sampling(20, min_new_tokens=12, stop_tokens=tuple(ends))
    response = talk(tiny_server, lambda client: client.generate(PROMPT, sampling))
    tokens = [*PROMPT, *response.tokens.tolist()]
    assert len(response.tokens) >= 12 and all(response.tokens[:12] % 2 == 1)
    whole = reference_log_probs(tiny_server.model, tokens)[len(PROMPT) :]
    left = reference_log_probs(tiny_server.model, tokens, masked=ends)[len(PROMPT) :]
    np.testing.assert_allclose(response.log_probs[:12], left[:12], atol=CLOSE)
    np.testing.assert_allclose(response.log_probs[12:], whole[12:], atol=CLOSE)
    assert (np.abs(left - whole)[:12] > 100 * CLOSE).all()


def test_an_aborted_response_keeps_what_it_has(tiny_server: TinyServer) -> None:
    async def abort(client: Client) -> Generation:
        request, pieces = new_request(), []
        async for piece in client.stream(PROMPT, LONG, request=request, routing=SHAPE):
            pieces.append(piece)
            if len(pieces) == 5:
                await client.abort(request)
        return gather(pieces)

    response = talk(tiny_server, abort)
    assert response.finish == "abort"
    assert 5 <= len(response.tokens) < LONG.max_new_tokens
    assert response.routing is not None and len(response.routing) == len(PROMPT) + len(response.tokens) - 1
    tokens = [*PROMPT, *response.tokens.tolist()]
    np.testing.assert_allclose(response.log_probs, reference_log_probs(tiny_server.model, tokens)[len(PROMPT) :], atol=CLOSE)


def test_leaving_a_stream_aborts_its_request(tiny_server: TinyServer) -> None:
    async def leave(client: Client) -> None:
        stream = client.stream(PROMPT, LONG)
        await anext(stream)
        await stream.aclose()
        await client.generate(PROMPT, Sampling(LONG.max_new_tokens // 5, ignore_end=True))
        await flush(client)  # refused while anything runs: four fifths of the one that was left would

    talk(tiny_server, leave)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_every_token_knows_the_weights_that_sampled_it(tiny_server: TinyServer, mode: PauseMode) -> None:
    """Log-probs tell which weights made a token: before the update they match the old model, and only there.

    After it they match neither, since the new weights read keys and values of the old: with `in_place` by intention, with
    `retract` because what is computed again begins with what the prefix cache still has. With `abort` there is no after.
    """

    async def update(client: Client) -> tuple[list[Piece], Generation]:
        before: list[Piece] = []
        started, sampling = asyncio.Event(), Sampling(200, ignore_end=True, piece=1)

        async def sample() -> None:
            async for piece in client.stream(PROMPT, sampling, cache_key="0"):
                before.append(piece)
                if len(before) == 20:
                    started.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sample())
            await started.wait()
            await client.pause(mode)
            later = tasks.create_task(client.generate(PROMPT, sampling, cache_key="1"))  # waits for `resume`
            await client.update_from_disk(str(tiny_server.other), version=1)
            await client.resume()
        await client.update_from_disk(str(tiny_server.model), version=0)
        return before, later.result()

    pieces, later = talk(tiny_server, update)
    response = gather(pieces)
    old = response.spans[0].length
    assert old >= 20
    assert response.spans[0].version == 0
    assert [span.version for span in response.spans[1:]] == ([] if mode == "abort" else [1])
    tokens = [*PROMPT, *response.tokens.tolist()]
    matches_old = np.abs(response.log_probs - reference_log_probs(tiny_server.model, tokens)[len(PROMPT) :]) < CLOSE
    assert matches_old[:old].all()
    assert not matches_old[old:].any()
    assert [span.version for span in later.spans] == [1]
    tokens = [*PROMPT, *later.tokens.tolist()]
    np.testing.assert_allclose(later.log_probs, reference_log_probs(tiny_server.other, tokens)[len(PROMPT) :], atol=CLOSE)


def test_weights_arrive_by_value(tiny_server: TinyServer) -> None:
    async def update(client: Client) -> tuple[int | None, np.ndarray, int | None, np.ndarray]:
        await client.update_from_tensors(load_file(tiny_server.other / "model.safetensors"), version=7)
        await flush(client)
        new = (await client.model_info()).version, await client.score(PROMPT)
        await client.update_from_tensors(load_file(tiny_server.model / "model.safetensors"), version=0)
        await flush(client)
        return *new, (await client.model_info()).version, await client.score(PROMPT)

    version, new, version_again, again = talk(tiny_server, update)
    assert (version, version_again) == (7, 0)
    np.testing.assert_allclose(new, reference_log_probs(tiny_server.other, PROMPT), atol=CLOSE)
    np.testing.assert_allclose(again, reference_log_probs(tiny_server.model, PROMPT), atol=CLOSE)


def test_what_a_server_can_do(tiny_server: TinyServer) -> None:
    async def ask(client: Client) -> None:
        info, model = await client.server_info(), await client.model_info()
        assert info.returns_routing and not info.deterministic and info.prefix_cache
        assert info.pool_tokens == 16384 and info.max_requests > 0 and info.longest_input > 2000
        assert (model.family, model.path, model.version) == ("qwen3_moe", str(tiny_server.model), 0)
        await client.set_version(3)
        assert (await client.model_info()).version == 3
        await client.set_version(0)
        assert await client.healthy()

    talk(tiny_server, ask)


def test_what_would_kill_a_server_does_not(tiny_server: TinyServer) -> None:
    async def try_to_kill(client: Client) -> None:
        for prompt in ([], [VOCABULARY], [-1]):
            with pytest.raises(ValueError, match="token"):
                await client.generate(prompt, LONG)
        with pytest.raises(ValueError, match="has not given back any memory"):
            await client.wake()
        with pytest.raises(ValueError, match="not joined"):
            await client.update_from_distributed(["a"], ["float32"], [[1]], "nobody", version=1)

        begun = asyncio.Event()

        async def generate() -> Generation:
            pieces = []
            async for piece in client.stream(PROMPT, LONG):
                pieces.append(piece)
                begun.set()
            return gather(pieces)

        running = asyncio.create_task(generate())
        await begun.wait()
        with pytest.raises(Refused, match="Flush"):
            await client.flush_cache()
        await client.pause("retract")
        await client.update_from_disk(str(tiny_server.model), version=0)  # with a request in the queue
        await client.resume()
        await client.sleep()  # with a request running
        assert (await running).finish == "abort"
        with pytest.raises(ValueError, match="already"):
            await client.sleep()
        with pytest.raises(ValueError, match="it has given back cuda_graph, kv_cache, weights"):
            await client.resume()
        await client.wake()
        await client.resume()
        await client.set_version(0)
        assert await client.healthy()
        assert len((await client.generate(PROMPT, Sampling(3, ignore_end=True))).tokens) == 3

    talk(tiny_server, try_to_kill)


def test_refusals_say_what_the_server_says(tiny_server: TinyServer, tmp_path: Path) -> None:
    async def ask(client: Client) -> None:
        with pytest.raises(Refused, match=r"/generate: .*longer than the model's context") as refused:
            await client.generate(PROMPT * 500, LONG)
        assert refused.value.status == 400 and not refused.value.is_overload
        with pytest.raises(Refused, match="/update_weights_from_disk"):
            await client.update_from_disk(str(tmp_path), version=1)
        with pytest.raises(Refused, match="temperature"):
            await client.generate(PROMPT, Sampling(3, temperature=-1.0))
        assert (await client.model_info()).version == 0

    talk(tiny_server, ask)


def test_nobody_there(tiny_server: TinyServer) -> None:
    async def ask(_: Client) -> None:
        async with Client(f"http://127.0.0.1:{free_ports(1)[0]}", VOCABULARY) as dead:
            for call in (dead.model_info(), dead.generate(PROMPT, LONG), dead.pause("abort")):
                with pytest.raises(Unreachable, match=dead.url):
                    await call

    talk(tiny_server, ask)


def test_silence_is_timed_but_a_pause_is_not_silence(tiny_server: TinyServer) -> None:
    async def wait(client: Client) -> None:
        async with Client(client.url, VOCABULARY, patience=Patience(silence=1.5)) as hasty:
            await client.pause("in_place")
            with pytest.raises(TimedOut, match=r"silent for 1\.5 s"):
                await hasty.generate(PROMPT, Sampling(3))
            await client.resume()

            await hasty.pause("in_place")
            waiting = asyncio.create_task(hasty.generate(PROMPT, Sampling(3, ignore_end=True)))
            await asyncio.sleep(2.0)
            assert not waiting.done()
            await hasty.resume()
            assert len((await waiting).tokens) == 3

    talk(tiny_server, wait)

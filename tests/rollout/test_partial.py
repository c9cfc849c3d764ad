"""Partial rollouts on a real server: what was cut off goes on under newer weights, and every token of it is accounted for."""

import asyncio
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from megatron_rl.config.rollout_settings import ServerSettings
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.collector import Collector, Plan
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.session import Kept
from megatron_rl.rollout.strategies.base import Floor, Limits
from megatron_rl.rollout.strategies.grouped import Grouped
from megatron_rl.rollout.suitability import Demands
from megatron_rl.types import Group, Prompt, Sample
from tests.reference.tiny_checkpoint import saved_tokenizer
from tests.rollout.scripted import Grader
from tests.rollout.talk import SECONDS, reference_log_probs
from tests.servers import SHAPE, VOCABULARY, TinyServer

CLOSE = 1e-4  # log-probs in float32, by different kernels
ASKED, FEW, MORE, LONG = 7, 24, 12, 1500  # tokens: of a prompt, of the first response, after a cut, and far too many
CUT = ("p1@1", "p2@2")


class Prompts:
    """The first gets a few tokens for an answer, so that the others are cut off."""

    def at(self, draw: int) -> Prompt:
        return Prompt(f"p{draw}", np.arange(10 + draw, 10 + draw + ASKED), max_new_tokens=FEW if draw == 0 else None)


def weights(server: TinyServer, version: int | None) -> Path:
    """The weights of a version: they change with every step."""
    assert version is not None
    return server.other if version % 2 else server.model


async def sample_in_parts(server: TinyServer, bank: Bank) -> dict[str, Group]:
    """Steps of a group each, with an update after each; returns what was cut off in the first."""
    settings = ServerSettings(urls=(server.server.url,), piece=4)
    async with asyncio.timeout(SECONDS), Pool(settings, Demands("qwen3_moe", VOCABULARY, SHAPE)) as pool:
        await pool.begin()
        floor = Floor(pool, Grader(), Sampling(LONG, ignore_end=True), Limits(LONG, 2000))
        kept = Kept(bank, saved_tokenizer(), texts=False)
        sampler = Collector(Prompts(), Grouped(2), floor, kept, Plan(1, partial=True, over_sampling=3.0))
        try:
            first = await sampler.collect(0)
            assert first.keys == ["p0@0"] and first.cut == 4
            cut = {key: bank.read(key) for key in bank.carried()}
            longest = max(sample.length for group in cut.values() for sample in group.samples)
            floor.limits = Limits(longest - ASKED + MORE, 2000)
            sealed: list[str] = []
            for version in range(1, 6):
                if not set(CUT) <= set(sealed):
                    path = str(weights(server, version))
                    await pool.fleet.update(version, lambda client, p=path, v=version: client.update_from_disk(p, v))  # type: ignore[misc]
                    sampler.updated(version)
                    sealed += (await sampler.collect(version)).keys
            return cut
        finally:
            async with server.client() as client:
                await client.resume()
                await client.update_from_disk(str(server.model), version=0)


def chosen_experts(model: Path, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[tokens - 1, layers, chosen] by transformers, ordered by number."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(torch.from_numpy(tokens)[None], output_router_logits=True).router_logits  # layers x [tokens, experts]
    chosen = torch.stack([each.topk(SHAPE.chosen).indices.sort(-1).values[:-1] for each in logits], dim=1)
    return chosen.numpy()


def check(server: TinyServer, sample: Sample, before: Sample) -> None:
    """A sample that was cut off once or more often; `before` is what it was at the first cut."""
    assert before.finish == "abort" and before.length < ASKED + LONG
    np.testing.assert_array_equal(sample.tokens[: before.length], before.tokens)
    np.testing.assert_array_equal(sample.log_probs[: before.length], before.log_probs)
    assert sample.segments[: len(before.segments)] == before.segments and before.segments[-1].stop == before.length
    prompt, *own = sample.segments
    assert (prompt.author, prompt.start, prompt.stop) == ("prompt", 0, ASKED)
    assert [segment.start for segment in own] == [segment.stop for segment in sample.segments[:-1]]
    assert own[-1].stop == sample.length and sample.finish == "length"
    assert [segment.version for segment in own] == sorted({segment.version or 0 for segment in own})
    np.testing.assert_array_equal(np.flatnonzero(sample.loss_mask), np.arange(ASKED, sample.length))
    assert sample.routing is not None and len(sample.routing) == sample.length - 1
    for segment in own:
        model, written = weights(server, segment.version), slice(segment.start, segment.stop)
        expected = reference_log_probs(model, sample.tokens.tolist())
        np.testing.assert_allclose(sample.log_probs[written], expected[written], atol=CLOSE)
        before_each = slice(segment.start - 1, segment.stop - 1)
        np.testing.assert_array_equal(
            np.sort(sample.routing[before_each], axis=-1), chosen_experts(model, sample.tokens)[before_each]
        )


def test_what_was_cut_off_goes_on_and_every_token_keeps_its_version(tiny_server: TinyServer, tmp_path: Path) -> None:
    with Bank(tmp_path / "bank") as bank:
        cut = asyncio.run(sample_in_parts(tiny_server, bank))
    assert cut.keys() == set(CUT)
    assert any(sample.length > ASKED for group in cut.values() for sample in group.samples)  # else nothing went on
    reader = BankReader(tmp_path / "bank")
    groups = [group for step in reader.steps() for group in reader.step(step).groups()]
    assert len({group.key for group in groups}) == len(groups)
    finished = {group.key: group for group in groups if group.key in cut}
    assert finished.keys() == cut.keys()
    for key, group in finished.items():
        assert len({sample.length for sample in group.samples}) == 1  # each went on to the same limit
        for sample, before in zip(group.samples, cut[key].samples, strict=True):
            check(tiny_server, sample, before)

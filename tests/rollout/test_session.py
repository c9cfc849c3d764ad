"""Sampling as a whole on a real server: prompts in, groups with honest log-probs and rewards in the bank."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.errors import UserError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.settings import Settings
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.rollout.environment import Environment, Observation
from megatron_rl.rollout.only import Filled, fill, read_state
from megatron_rl.types import Prompt, Sample
from tests.servers import SHAPE, VOCABULARY, Address, TinyServer


def settings_of(server: TinyServer, folder: Path, **sections: Any) -> Settings:
    defaults: dict[str, Any] = {
        "policy": {"init": server.model},
        "precision": {"dtype": "float32"},
        "batch": {"max_tokens": 400},
        "data": {"sources": [{"path": "task:arithmetic"}]},
        "rewards": [{"name": "numeric"}, {"name": "length", "weight": 0.5, "options": {"high": 8}}],
        "sampling": {"groups": 2, "group_size": 3, "max_new_tokens": 12},
        "servers": {"urls": [server.server.url]},
        "run": {"directory": folder / "run"},
    }
    return Settings.model_validate({name: sections.get(name, given) for name, given in {**sections, **defaults}.items()})


def filled(settings: Settings, steps: int) -> list[Filled]:
    """What `fill` reports; a server of its own it must not start."""

    def starting() -> None:
        raise AssertionError("servers are started")

    async def run() -> list[Filled]:
        model = read_architecture(settings.policy.config)
        return [each async for each in fill(settings, model, steps, lambda session, step: None, starting)]

    return asyncio.run(run())


def check_log_probs(model: Path, samples: list[Sample], temperature: float) -> None:
    """What the server said of the tokens it wrote is what transformers says, at the sampling temperature."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for sample in samples:
        with torch.no_grad():
            logits = loaded(torch.from_numpy(sample.tokens)[None]).logits[0, :-1] / temperature
        theirs = logits.log_softmax(-1).gather(1, torch.from_numpy(sample.tokens[1:])[:, None])[:, 0].numpy()
        wrote = sample.loss_mask[1:]
        np.testing.assert_allclose(sample.log_probs[1:][wrote], theirs[wrote], atol=1e-4)
        assert not sample.log_probs[1:][~wrote].any()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_steps_are_sealed_and_sampling_goes_on(tiny_server: TinyServer, tmp_path: Path, temperature: float) -> None:
    policy = {"init": tiny_server.model, "temperature": temperature}
    sampling = {"groups": 2, "group_size": 3, "max_new_tokens": 12, "routing": temperature == 1.0}
    settings = settings_of(tiny_server, tmp_path, policy=policy, sampling=sampling)
    assert [each.collected.step for each in filled(settings, 2)] == [0, 1]
    assert [each.collected.step for each in filled(settings, 3)] == [2]  # only what is missing
    assert filled(settings, 3) == []
    step, position = read_state(settings.run.directory)
    assert (step, position.draws, position.pending) == (3, 6, ())
    reader = BankReader(settings.bank_directory)
    groups = [group for number in reader.steps() for group in reader.step(number).groups()]
    assert [group.key.partition("@")[2] for group in groups] == [str(draw) for draw in range(6)]
    samples = [sample for group in groups for sample in group.samples]
    assert len(samples) == 18 and all(sample.failure is None for sample in samples)
    for sample in samples:
        assert sample.rewards.keys() == {"numeric", "length"}
        assert sample.reward == pytest.approx(sample.rewards["numeric"] + 0.5 * sample.rewards["length"])
        assert [segment.version for segment in sample.segments] == [None, 0]
        if settings.sampling.routing:
            assert sample.routing is not None and sample.routing.dtype == np.uint8
            assert sample.routing.shape == (sample.length - 1, SHAPE.layers, SHAPE.chosen)
            assert sample.routing.max() < SHAPE.experts and (sample.routing[..., 0] != sample.routing[..., 1]).all()
        else:
            assert sample.routing is None
    check_log_probs(tiny_server.model, samples, temperature)


def test_episodes_with_a_tool(tiny_server: TinyServer, tmp_path: Path) -> None:
    """A random model never calls the calculator, so what it says is taken for a call: two turns of it, one answer between.

    Every second token ends a turn, so that no turn goes on to its limit, which would end the episode.
    """
    environment = "tests.rollout.test_session:Echo"
    sampling = {"strategy": "episodes", "environment": environment, "groups": 1, "group_size": 2, "max_turns": 2}
    ends = list(range(1, VOCABULARY, 2))
    settings = settings_of(tiny_server, tmp_path, sampling={**sampling, "max_new_tokens": 100, "stop_token_ids": ends})
    (report,) = filled(settings, 1)
    assert report.failed == 0
    (group,) = BankReader(settings.bank_directory).step(0).groups()
    for sample in group.samples:
        assert [segment.author for segment in sample.segments] == ["prompt", "policy", "environment", "policy"]
        said = sample.segments[2]
        assert not sample.loss_mask[said.start : said.stop].any()
        assert sample.loss_mask.sum() == sum(s.stop - s.start for s in sample.segments if s.author == "policy")
    check_log_probs(tiny_server.model, list(group.samples), 1.0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"servers": {"urls": ["http://127.0.0.1:9"]}}, "Correct servers.urls"),
        ({"rewards": [{"name": "numerik"}], "servers": {}}, "Did you mean 'numeric'"),
        ({"rewards": [{"name": "code"}], "servers": {}}, "reads the column"),
        ({"data": {"sources": [{"path": "task:arithmatic"}]}, "servers": {}}, "arithmetic"),
        ({"data": {"sources": []}, "servers": {}}, "there are no sources of train prompts"),
        ({"sampling": {"strategy": "episodes", "environment": "nowhere:Env"}, "servers": {}}, "sampling.environment = nowhere"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(
    tiny_server: TinyServer, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    """Also where servers would be started: before that."""
    with pytest.raises(UserError, match=message):
        filled(settings_of(tiny_server, tmp_path, **sections), 1)


def test_it_ends_when_told_to_also_while_it_waits_for_servers(
    tiny_models: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = TinyServer(Address("http://127.0.0.1:9"), *tiny_models)
    settings = settings_of(server, tmp_path, servers={"urls_file": tmp_path / "urls", "probe_seconds": 0.05})
    model = read_architecture(settings.policy.config)

    async def sample() -> None:
        async for _ in fill(settings, model, 1, lambda session, step: None):
            raise AssertionError("nobody samples")

    async def run() -> None:
        async with asyncio.timeout(60):
            sampling = asyncio.create_task(sample())
            while "names no server yet" not in caplog.text and not sampling.done():
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait([sampling])
            assert sampling.cancelled()

    asyncio.run(run())
    assert caplog.text.count("the servers stay as they are") == 1  # it looked ten times
    with Bank(tmp_path / "run/bank") as bank:  # it was let go
        assert bank.waiting() == []


def test_the_command_says_warnings_and_errors_before_it_starts_servers(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"policy: {{init: {tiny_models[0]}}}\nrun: {{directory: {tmp_path / 'run'}}}\n")
    unwise = ["sampling.min_new_tokens=3", "data.sources=[{path: task:arithmetic}]", "rewards=[{name: numerik}]"]
    result = CliRunner().invoke(app, ["rollout", str(recipe), *unwise])
    assert result.exit_code == 2 and result.stdout == ""
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: sampling.min_new_tokens = 3: ")
    assert error.startswith("error: rewards[0].name = numerik: ")


class Echo(Environment):
    """Answers whatever is said, once."""

    async def reset(self, prompt: Prompt) -> None:
        self.said = 0

    async def step(self, text: str) -> Observation:
        self.said += 1
        return Observation(({"role": "tool", "content": "go on"},), done=self.said == 2)

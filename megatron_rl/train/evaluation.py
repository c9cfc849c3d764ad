"""Evaluation: how well a model answers validation prompts, by its rewards, with sampling settings of its own.

Responses come from the same servers as rollouts do, token in, token out, and are judged by the same rewards. Which prompts are
asked follows from the settings alone, and nothing here touches the state of training.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import SettingsError, UserError
from megatron_rl.config.learning_settings import EvaluationSettings
from megatron_rl.config.settings import Settings
from megatron_rl.data.prompts import PromptStream, open_prompts, open_tokenizer
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.rewards import registry
from megatron_rl.rewards.base import TellsAnswer
from megatron_rl.rewards.model import Grader, RewardModel, policy_text
from megatron_rl.rollout.bank import files
from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.errors import ServerError
from megatron_rl.rollout.keys import api_key
from megatron_rl.rollout.only import weights_of
from megatron_rl.rollout.own_servers import own_servers
from megatron_rl.rollout.pool import GenerationFailed, NoServer, Pool
from megatron_rl.rollout.session import require_columns
from megatron_rl.rollout.strategies.base import Floor, Generator, Limits
from megatron_rl.rollout.strategies.grouped import Grouped
from megatron_rl.rollout.suitability import Demands
from megatron_rl.train.estimates import draws, majority, pass_at
from megatron_rl.types import Prompt, Sample

COLUMNS = pa.schema(
    {
        "step": pa.int64(),
        "key": pa.string(),
        "prompt": pa.string(),
        "fields": pa.string(),  # JSON
        "responses": pa.list_(pa.string()),
        "answers": pa.list_(pa.string()),
        "right": pa.list_(pa.bool_()),
        "reward": pa.list_(pa.float64()),
        "rewards": pa.list_(pa.string()),  # JSON, by component
        "failures": pa.list_(pa.string()),
        "finish": pa.list_(pa.string()),
        "tokens": pa.list_(pa.list_(pa.int32())),
        "prompt_tokens": pa.list_(pa.int32()),
    }
)

type Advance = Callable[[int, int], None]  # prompts answered so far, and all


@dataclass(frozen=True)
class Answered:
    """A prompt with the responses to it."""

    prompt: Prompt
    samples: Sequence[Sample]
    texts: Sequence[str]
    answers: Sequence[str | None]  # what each settles on, where a reward can tell
    right: Sequence[bool]


class EvaluationFailed(UserError, RuntimeError):
    """Servers did not answer a prompt, or refused it."""


class Evaluator:
    """Asks validation prompts whenever it is told to. One of them lives as long as its servers."""

    def __init__(
        self, settings: EvaluationSettings, prompts: PromptStream, floor: Floor, rewards: RewardModel, directory: Path
    ) -> None:
        """`directory` is where the responses are kept."""
        self._settings, self._floor, self._rewards, self._directory = settings, floor, rewards, directory
        self.prompts = {source.name: list(source.evenly(settings.prompts)) for source in prompts.sources}
        self._files = _file_names(self.prompts)
        self._teller = next((each.reward for each in rewards.components if isinstance(each.reward, TellsAnswer)), None)

    @property
    def tells_majority(self) -> bool:
        """Can any of the rewards tell which answer a response gives? Without one there is no maj@n."""
        return self._teller is not None

    async def evaluate(self, step: int | None = None, advance: Advance = lambda done, total: None) -> dict[str, float]:
        """Metrics of the weights that the servers have now, by source: {"arithmetic/avg@4": 0.31, …}.

        Every response is kept in NAME-step-000010.parquet; in NAME.parquet where there is no step.
        """
        total, done = sum(map(len, self.prompts.values())), 0

        def answered_one() -> None:
            nonlocal done
            done += 1
            advance(done, total)

        metrics: dict[str, float] = {}
        for name, prompts in self.prompts.items():
            answered = await self._all(name, prompts, answered_one)
            _write(self.results(name, step), answered, step)
            metrics |= {f"{name}/{metric}": value for metric, value in self._metrics(answered).items()}
        return metrics

    def results(self, name: str, step: int | None = None) -> Path:
        """Where the responses to a source's prompts are kept."""
        suffix = "" if step is None else f"-step-{step:06d}"
        return self._directory / f"{self._files[name]}{suffix}.parquet"

    async def _all(self, name: str, prompts: Sequence[Prompt], answered_one: Callable[[], None]) -> list[Answered]:
        """All prompts at once: the servers' pool lets them through as there is room. The first that fails ends the others."""

        async def one(prompt: Prompt) -> Answered:
            answered = await self._ask(prompt)
            answered_one()
            return answered

        try:
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(one(prompt)) for prompt in prompts]
        except BaseExceptionGroup as group:
            of_servers, others = group.split((ServerError, GenerationFailed, NoServer))
            if of_servers is None or others is not None:
                raise
            raise EvaluationFailed(f"{name} could not be evaluated: {_first(of_servers)}") from group
        return [task.result() for task in asked]

    async def _ask(self, prompt: Prompt) -> Answered:
        grouped = Grouped(self._settings.samples)
        (graded,) = (await grouped.run(prompt, f"evaluation/{prompt.key}", self._floor)).groups
        samples = graded.samples
        texts = [self._text(sample) for sample in samples]
        right = [sample.failure is None and sample.reward >= self._settings.correct_at for sample in samples]
        return Answered(prompt, samples, texts, [self._answer(*each) for each in zip(samples, texts, strict=True)], right)

    def _text(self, sample: Sample) -> str:
        return policy_text(sample, self._rewards.decode, self._rewards.settings.text)

    def _answer(self, sample: Sample, text: str) -> str | None:
        """Of a sample that could be judged: its text is known to be one that can be searched in time."""
        return self._teller.answer(text) if self._teller is not None and sample.failure is None else None

    def _metrics(self, answered: Sequence[Answered]) -> dict[str, float]:
        count = self._settings.samples
        right = [sum(each.right) for each in answered]
        samples = [sample for each in answered for sample in each.samples]
        metrics = {f"avg@{count}": _mean([number / count for number in right])}
        metrics |= {f"pass@{k}": _mean([pass_at(count, number, k) for number in right]) for k in draws(count)}
        if self.tells_majority:
            metrics[f"maj@{count}"] = _mean([majority(each.answers, each.right) for each in answered])
        metrics["reward"] = _mean([sample.reward for sample in samples])
        for component in self._rewards.components:
            given = [sample.rewards[component.name] for sample in samples if component.name in sample.rewards]
            metrics[f"reward/{component.name}"] = _mean(given)
        metrics["length"] = _mean([float(sample.loss_mask.sum()) for sample in samples])
        metrics["truncated"] = _mean([float(sample.finish != "stop") for sample in samples])
        metrics["failed"] = _mean([float(sample.failure is not None) for sample in samples])
        return metrics


def open_evaluator(
    settings: Settings, model: Architecture, generator: Generator, rewards: RewardModel, tokenizer: Tokenizer
) -> Evaluator:
    """An evaluator over what a session has open; what is wrong with validation prompts is told here."""
    prompts = open_prompts(settings, tokenizer, "validation")
    require_columns(rewards.components, prompts)
    own, training = settings.evaluation, settings.sampling
    sampling = Sampling(
        own.max_new_tokens or training.max_new_tokens,
        temperature=own.temperature,
        top_p=own.top_p,
        top_k=own.top_k or -1,
        stop_tokens=training.stop_token_ids,  # what ends a response is the same in training
        stop=training.stop,
    )
    floor = Floor(generator, Grader(rewards), sampling, Limits(sampling.max_new_tokens, total=model.max_positions))
    return Evaluator(own, prompts, floor, rewards, settings.run.directory / "evaluations")


@asynccontextmanager
async def open_alone(settings: Settings, model: Architecture) -> AsyncIterator[Evaluator]:
    """An evaluator with servers of its own, or given ones, and nothing that trains."""
    components = registry.build(settings.rewards)
    if not components:
        raise SettingsError("rewards: there are none, so no response would be right. Name one, such as rewards=[{name: math}].")
    tokenizer = open_tokenizer(settings, vocab=model.vocab)
    require_columns(components, open_prompts(settings, tokenizer, "validation"))  # before servers take their time to start
    files.private_folder(settings.run.directory)
    version = await weights_of(settings.servers.urls, model, api_key(settings))
    key = partial(api_key, settings)
    pool = Pool(settings.servers, Demands.of(model), api_key=key, version=version, decode=tokenizer.decode)
    async with RewardModel(components, settings.scoring, lambda ids: tokenizer.text(ids.tolist())) as rewards, pool:
        await pool.begin(own_servers(settings))
        yield open_evaluator(settings, model, pool, rewards, tokenizer)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Groups may hold groups; what went wrong is at the bottom."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _file_names(sources: Mapping[str, object]) -> dict[str, str]:
    """Source names as file names, distinct where the names are."""
    found: dict[str, str] = {}
    for name in sources:
        plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "prompts"
        taken = set(found.values())
        found[name] = next(each for i in range(len(taken) + 1) if (each := plain if not i else f"{plain}-{i}") not in taken)
    return found


def _write(path: Path, answered: Sequence[Answered], step: int | None) -> None:
    """A row a prompt; the file appears whole or not at all."""
    rows = [
        {
            "step": step,
            "key": each.prompt.key,
            "prompt": each.prompt.messages[-1]["content"] if each.prompt.messages else "",
            "fields": json.dumps(dict(each.prompt.fields), ensure_ascii=False, default=str),
            "responses": list(each.texts),
            "answers": list(each.answers),
            "right": list(each.right),
            "reward": [sample.reward for sample in each.samples],
            "rewards": [json.dumps(dict(sample.rewards)) for sample in each.samples],
            "failures": [sample.failure for sample in each.samples],
            "finish": [sample.finish for sample in each.samples],
            "tokens": [sample.tokens[sample.prompt_length :].tolist() for sample in each.samples],
            "prompt_tokens": each.prompt.tokens.tolist(),
        }
        for each in answered
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = files.beside(path)
    pq.write_table(pa.Table.from_pylist(rows, schema=COLUMNS), partial)
    files.sync_file(partial)
    files.rename(partial, path)

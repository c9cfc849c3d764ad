"""Sampling as a whole, opened from the settings: prompts, servers, rewards, the bank, and the collector over them.

Everything that can be wrong is said while it opens, the cheap checks first: data and rewards before a server is started.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import SettingsError
from megatron_rl.config.settings import Settings
from megatron_rl.data.prompts import PromptStream, open_prompts, open_tokenizer
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.rewards import registry
from megatron_rl.rewards.model import Grader, RewardModel
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.rollout.chat import Chat
from megatron_rl.rollout.collector import BEGINNING, Collector, Position
from megatron_rl.rollout.connection import Key
from megatron_rl.rollout.pool import Pool
from megatron_rl.rollout.server import ServerOptions
from megatron_rl.rollout.strategies.base import Floor
from megatron_rl.rollout.strategies.choose import make_limits, make_plan, make_sampling, make_strategy
from megatron_rl.rollout.suitability import Demands
from megatron_rl.types import Group, Prompt


@dataclass(frozen=True)
class Draws:
    """Prompts by the number of their draw."""

    stream: PromptStream

    def at(self, draw: int) -> Prompt:
        return self.stream.at(draw).prompt


@dataclass(frozen=True)
class Kept:
    """The bank as the collector knows it; sealed steps hold texts too where they are wanted."""

    bank: Bank
    tokenizer: Tokenizer
    texts: bool

    async def add(self, group: Group) -> None:
        await self.bank.add(group)

    def carry(self, group: Group) -> object:
        return self.bank.carry(group)

    def discard(self, key: str, reason: str) -> object:
        return self.bank.discard(key, reason)

    def carried(self) -> list[str]:
        return self.bank.carried()

    def waiting(self, step: int | None = None) -> list[str]:
        return self.bank.waiting(step)

    def read(self, key: str) -> Group:
        return self.bank.read(key)

    def sealed_keys(self, step: int) -> list[str] | None:
        if step not in self.bank.sealed_steps():
            return None
        with self.bank.sealed(step) as sealed:
            return sealed.keys()

    def seal(self, step: int, keys: list[str]) -> None:
        self.bank.seal(step, keys, decode=self.tokenizer.decode if self.texts else None)


@dataclass(frozen=True)
class Session:
    """What is open while a run samples."""

    collector: Collector
    pool: Pool
    bank: Bank
    prompts: PromptStream
    rewards: RewardModel
    tokenizer: Tokenizer


@asynccontextmanager
async def open_session(
    settings: Settings,
    model: Architecture,
    own_servers: Sequence[ServerOptions],
    *,
    api_key: Key = None,
    version: int = 0,
    step: int = 0,
    position: Position = BEGINNING,
    last: int | None = None,
    starting: Callable[[], None] = lambda: None,
) -> AsyncIterator[Session]:
    """Open everything; leaving ends the servers that are ours.

    `version` is that of the weights which servers shall have; `step` and `position` are where a resumed run goes on, and
    `last` is the step it ends with. `starting` is told when all but the servers is well, and those of our own are about to be
    started.
    """
    components = registry.build(settings.rewards)
    tokenizer = open_tokenizer(settings, vocab=model.vocab)
    prompts = open_prompts(settings, tokenizer)
    chat = Chat(tokenizer, settings.data.chat_template_kwargs)
    strategy = make_strategy(settings.sampling, chat)
    limits = make_limits(settings)
    require_columns(components, prompts)
    demands = Demands.of(model, routing=settings.keeps_routing, longest=limits.total, sleeps=settings.servers.colocated)
    pool = Pool(settings.servers, demands, api_key=api_key, version=version, decode=tokenizer.decode)
    with Bank(settings.bank_directory, settings.bank, tokenizer=tokenizer.path) as bank:
        async with RewardModel(components, settings.scoring, lambda ids: tokenizer.text(ids.tolist())) as rewards, pool:
            if own_servers:
                starting()
            await pool.begin(own_servers)
            floor = Floor(pool, Grader(rewards), make_sampling(settings), limits)
            collector = Collector(
                Draws(prompts),
                strategy,
                floor,
                Kept(bank, tokenizer, texts=settings.bank.texts),
                make_plan(settings.sampling),
                step=step,
                position=position,
                last=last,
            )
            try:
                yield Session(collector, pool, bank, prompts, rewards, tokenizer)
            finally:
                await collector.close()


def require_columns(components: Sequence[registry.Component], prompts: PromptStream) -> None:
    """Every reward finds the columns that it reads in every source's prompts."""
    for name, wanted in registry.columns(components).items():
        for source in prompts.sources:
            fields = source.prompt(0).fields
            missing = sorted(wanted - fields.keys())
            if missing:
                raise SettingsError(
                    f"rewards: {name} reads the column {missing[0]}, which prompts of {source.name} do not have (they have "
                    f"{', '.join(sorted(fields)) or 'none'}). Map it in data.sources: answer: COLUMN, or fields: "
                    f"{{{missing[0]}: COLUMN}}."
                )

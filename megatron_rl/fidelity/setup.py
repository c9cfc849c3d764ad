"""What is compared with what: settings of the policy out of a checkpoint, of the server, and prompts."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.config.settings import Settings
from megatron_rl.data.tokenizer import Tokenizer
from megatron_rl.rollout.server import has_gpu
from megatron_rl.weights.checkpoint_files import MANIFEST
from megatron_rl.weights.sources import MegatronSource, Source, open_source

# Of the run that a checkpoint is of: what its log-probs depend on.
KEPT = ("policy.temperature", "precision.dtype", "precision.fp8", "precision.fp8_recipe",
        "precision.fp8_skip_first_layers", "precision.fp8_skip_last_layers")  # fmt: skip
RANDOM_TOKENS = 24  # of a prompt without a tokenizer
SERVERS_SHARE = 0.5  # of a GPU's memory, where an own server is on it beside the policy
# Prose, arithmetic, code, lists, other scripts: routers send them to different experts.
TEXTS = (
    "The history of the town begins with a bridge, which",
    "Question: A train leaves at 14:35 and arrives at 17:10. How long does it take? Let us think step by step.",
    "def longest_common_prefix(words: list[str]) -> str:\n    ",
    "1. Wash the rice\n2. Boil the water\n3.",
    "Theorem. There are infinitely many primes. Proof.",
    "床前明月光",
    "Der Unterschied zwischen Wetter und Klima ist, dass",
    '{"name": "Ada", "born": 1815, "known_for": [',
)


def settings_of(checkpoint: Path, overrides: Sequence[str], servers: Sequence[str], like: Path | None = None) -> Settings:
    """The policy as its run had it, where the checkpoint tells; then the overrides. An own server computes in its format."""
    given = [f"policy.init={json.dumps(str(checkpoint))}"]
    source = open_source(checkpoint, like)
    try:
        given.append(f"policy.config={json.dumps(str(source.description))}")
        saved = source.files.manifest.get("settings", {}) if isinstance(source, MegatronSource) else {}
        for name in KEPT:
            section, _, member = name.partition(".")
            if member in saved.get(section, {}):
                given.append(f"{name}={json.dumps(saved[section][member])}")
        if servers:
            given.append(f"servers.urls={json.dumps(list(servers))}")
        settings = load_settings(None, [*given, *overrides])
        if servers:
            return settings
        _require_one_of_our_own(settings)
        own = [f"sglang.dtype={settings.precision.dtype}", "servers.count=1"]
        if settings.device.kind != "cpu" and has_gpu():  # the policy comes to the same one
            own.append(f"sglang.mem_fraction_static={SERVERS_SHARE}")
        if isinstance(source, MegatronSource):
            own += [f"servers.model={json.dumps(str(source.description))}", "sglang.load_format=dummy"]
        if read_architecture(settings.policy.config).is_moe:
            own.append("sampling.routing=true")
        return load_settings(None, [*given, *own, *overrides])
    finally:
        source.close()


def _require_one_of_our_own(settings: Settings) -> None:
    """A server that somebody runs is one that weights are not sent to unasked."""
    servers = settings.servers
    if servers.urls or servers.urls_file is not None or servers.router is not None:
        raise SettingsError("a server that runs is named by --server URL, and not by servers.urls, urls_file or router.")
    if servers.count not in (None, 1):
        raise SettingsError(f"servers.count = {servers.count}: one server is looked at. Leave it out, or name one by --server.")


@contextmanager
def opened_checkpoint(settings: Settings) -> Iterator[Source]:
    """The weights of policy.init, and what they are."""
    checkpoint = Path(settings.policy.init)
    source = open_source(checkpoint, settings.policy.config if (checkpoint / MANIFEST).is_file() else None)
    try:
        source.check()
        yield source
    finally:
        source.close()


def step_of(source: Source) -> int | None:
    """The training step that a checkpoint is of; None for a Hugging Face folder, and for weights alone."""
    if isinstance(source, MegatronSource) and not source.files.manifest.get("weights_only"):
        return source.files.step
    return None


def prompts_of(settings: Settings, texts: Sequence[str], count: int) -> tuple[list[list[int]], str]:
    """Token ids to continue, and in words what they are: given texts, else the default ones, else random tokens."""
    vocabulary = read_architecture(settings.policy.config).vocab
    config = Path(settings.policy.config)
    folder = settings.data.tokenizer or (config if config.is_dir() else config.parent)
    if texts or settings.data.tokenizer or _has_tokenizer(Path(folder)):
        tokenizer = Tokenizer(str(folder))
        tokenizer.require_fits(vocabulary)
        chosen = list(texts) or [TEXTS[number % len(TEXTS)] for number in range(count)]
        found = tokenizer.encode(chosen, special=True)
        if not all(found):
            raise SettingsError("--prompt: a prompt has no tokens. Give it some text.")
        return found, f"{len(found)} {'given' if texts else 'default'} texts"
    drawn = np.random.default_rng(0).integers(0, vocabulary - 1, (count, RANDOM_TOKENS))
    return drawn.tolist(), f"{count} prompts of random tokens, since {folder} has no tokenizer"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))

"""SGLang servers of our own: started, waited for, ended.

A server is a process of its own, `python -m sglang.launch_server`, under a keeper (`keeper.py`) that ends it with all its
children when we end. On a machine without a GPU the server finds a stand-in for SGLang's CUDA kernels on its PYTHONPATH.
"""

import asyncio
import contextlib
import ipaddress
import itertools
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from megatron_rl.config.errors import SettingsError, UserError
from megatron_rl.config.sglang_arguments import command_line
from megatron_rl.rollout.bank.files import private_folder

HERE = Path(__file__).parent
CPU_STUB = HERE / "cpu_stub"
KEEPER = HERE / "keeper.py"
CPU_POOL_TOKENS = 16384  # tokens of all requests together whose keys and values are held, where nobody said otherwise
GLANCE = 0.25  # seconds between looks at a server that starts
TAIL = 25  # lines of the log that an error shows
PATIENCE = 20.0  # seconds that a keeper gets to end its server; it gives the server 10

# On a CPU there are no fused kernels to choose among, nothing to overlap with, and memory is shared with everything else.
CPU_ARGUMENTS: Mapping[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,  # the scheduler else turns a whole core while nobody asks anything
    "dtype": "float32",
    "max_total_tokens": CPU_POOL_TOKENS,
}
# Every server streams what is new in each piece, not everything so far again: the client counts on neither, but pays for both.
# Versions of weights are numbers, and those that a server starts with are version 0.
ALL_ARGUMENTS: Mapping[str, Any] = {"incremental_streaming_output": True, "weight_version": "0"}

# What a launcher says to its ranks is not for a server, which forms process groups of its own.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
AGENT = "TORCHELASTIC_"  # so begin those of torchrun, whose own store a server would wait at for ever


class ServerStartError(UserError, RuntimeError):
    """A server that did not come up. The message holds the end of its log."""


@dataclass(frozen=True)
class ServerOptions:
    """What one server is started with. `arguments` are SGLang's own, by name; they win over what we would choose."""

    model: str | Path
    log: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int | None = None  # None: a free one
    api_key: str | None = field(default=None, repr=False)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: tuple[int | str, ...] | None = None  # the GPUs that this server sees; None: those that this process sees
    ranks: tuple[int, ...] = ()  # of the trainer, whose GPUs these are too, in the same order
    threads: int | None = None  # on a CPU; None: all cores of this process
    start_seconds: float = 1800.0  # weights of hundreds of gigabytes take their time

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key:
            raise SettingsError(
                f"host = {self.host}: whoever reaches this address could change the weights and read every prompt. "
                "Listen on 127.0.0.1, or give the servers an API key."
            )

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu" or (self.device == "auto" and not has_gpu())


class Server:
    """A server process of our own. `start` returns at once; `ready` waits until it generates; `stop` ends it."""

    def __init__(self, options: ServerOptions, url: str, keeper: subprocess.Popen[bytes], secret: Path | None) -> None:
        self.options = options
        self.url = url
        self._keeper = keeper
        self._secret = secret

    @classmethod
    def start(cls, options: ServerOptions, port: int | None = None) -> Self:
        """Start the process. What the server says goes to its log."""
        chosen = options.port or port or free_ports(1)[0]
        private_folder(options.log.parent)
        _set_aside(options.log)
        secret = _write_key(options) if options.api_key else None
        with open(os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:  # SGLang logs its key
            keeper = subprocess.Popen(
                [sys.executable, str(KEEPER), str(os.getpid()), *server_command(options, chosen, secret)],
                env=_environment(options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we tell the keeper
            )
        return cls(options, f"http://{_reachable(options.host)}:{chosen}", keeper, secret)

    @property
    def alive(self) -> bool:
        return self._keeper.poll() is None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """The keeper's process id."""
        return self._keeper.pid

    async def ready(self) -> None:
        """Wait until the server has generated a token; a server that dies or dawdles is a ServerStartError."""
        deadline = time.monotonic() + self.options.start_seconds
        headers = {"Authorization": f"Bearer {self.options.api_key}"} if self.options.api_key else {}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60, trust_env=False) as client:
            while not await _generates(client, self.options.on_cpu):
                if not self.alive:
                    raise ServerStartError(f"The SGLang server at {self.url} ended while it started.\n{self._last_words()}")
                if time.monotonic() > deadline:
                    self.stop()
                    raise ServerStartError(
                        f"The SGLang server at {self.url} did not generate within {self.options.start_seconds:.0f} s "
                        f"and was stopped. Give it longer with servers.start_seconds.\n{self._last_words()}"
                    )
                await asyncio.sleep(GLANCE)
        self._forget_secret()

    def stop(self) -> None:
        """End the server and its children; a server that has ended already is fine."""
        if self._keeper.poll() is None:
            self._keeper.terminate()
            try:
                self._keeper.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._keeper.kill()  # the kernel ends the server with it
                self._keeper.wait()
        self._forget_secret()

    def kill(self) -> None:
        """End the server at once, as a crash would: nothing is asked, nothing is answered."""
        if self._keeper.poll() is None:
            self._keeper.kill()
            self._keeper.wait()
        self._forget_secret()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _forget_secret(self) -> None:
        """The server has read its key, and written it into its log."""
        if self._secret is not None:
            self._secret.unlink(missing_ok=True)
            self._secret = None
            _blank(self.options.log, repr(self.options.api_key).encode())

    def _last_words(self) -> str:
        self._forget_secret()
        lines = self.options.log.read_text(errors="replace").splitlines()[-TAIL:]
        return "\n".join([f"The end of its log, {self.options.log}:", *(f"  {line}" for line in lines)])


async def start_servers(options: Sequence[ServerOptions]) -> list[Server]:
    """Start servers side by side and wait until all of them generate. If one does not, none is left running."""
    ports = free_ports(len(options))
    servers = [Server.start(each, port) for each, port in zip(options, ports, strict=True)]
    try:
        await asyncio.gather(*(server.ready() for server in servers))
    except BaseException:
        await stop_servers(servers)
        raise
    return servers


async def start_again(server: Server) -> Server:
    """Start what is left of a server again, at the address that it had."""
    await asyncio.to_thread(server.stop)
    return Server.start(server.options, server.port)


async def stop_servers(servers: Sequence[Server]) -> None:
    """End servers side by side."""
    await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there and not hidden. Asked without torch, which takes seconds to import."""
    return any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):  # a host name, then
        return ipaddress.ip_address(host).is_loopback
    return False


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on; all are found before any is let go."""
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def _set_aside(log: Path) -> None:
    """What an earlier server said is kept, and what one that still runs here says goes on there."""
    if log.exists():
        number = next(number for number in itertools.count(1) if not log.with_suffix(f".{number}{log.suffix}").exists())
        log.rename(log.with_suffix(f".{number}{log.suffix}"))


def _reachable(host: str) -> str:
    """The name under which others reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def server_command(options: ServerOptions, port: int | None = None, secret: Path | None = None) -> list[str]:
    """The words that start the server. `secret` is a file with its API key."""
    arguments = {**ALL_ARGUMENTS, **(_cpu_arguments(options) if options.on_cpu else {}), **options.arguments}
    words = [f"--model-path={options.model}", f"--host={options.host}", *command_line(arguments)]
    if port is not None:
        words.append(f"--port={port}")
    if secret is not None:
        words += ["--config", str(secret)]
    return [sys.executable, "-m", "sglang.launch_server", *words]


def _cpu_arguments(options: ServerOptions) -> dict[str, Any]:
    """SGLang takes a share of the machine's memory for weights, keys and values together: no more than the weights need."""
    weights = sum(file.stat().st_size for file in Path(options.model).glob("*.safetensors"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        **CPU_ARGUMENTS,
        "mem_fraction_static": min(0.8, round(0.1 + 2 * weights / memory, 3)),
    }  # bfloat16 doubles in float32


def _write_key(options: ServerOptions) -> Path:
    """The API key in a file that only we read, until the server has: a command line is for everybody to see."""
    path = options.log.with_suffix(f".{secrets.token_hex(4)}.yaml")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"api-key": options.api_key}, file)  # JSON is YAML
    return path


def _blank(log: Path, secret: bytes) -> None:
    """Stars over a secret, in place: the server goes on writing behind it."""
    with open(log, "r+b") as file:
        text = file.read()
        for match in re.finditer(re.escape(secret), text):
            file.seek(match.start())
            file.write(b"*" * len(secret))


def _environment(options: ServerOptions) -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in RANK_VARIABLES and not name.startswith(AGENT)
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a start takes 30 s with cached bytecode, 100 s without
    if not os.access(sys.prefix, os.W_OK):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        environment.setdefault("PYTHONPYCACHEPREFIX", str(cache / "megatron-rl" / "bytecode"))
    if options.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, options.gpus))
    if options.ranks:  # it takes GPUs for taken by mistake when a trainer's ranks have left it more of one than of another
        environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "false"
    if options.on_cpu:
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["OMP_NUM_THREADS"] = str(options.threads or len(os.sched_getaffinity(0)))
        environment["PYTHONPATH"] = os.pathsep.join([str(CPU_STUB), *filter(None, [environment.get("PYTHONPATH")])])
    return environment


async def _generates(client: httpx.AsyncClient, on_cpu: bool) -> bool:
    """Whether the server answers and generates one token."""
    try:
        if (await client.get("/health")).status_code != httpx.codes.OK:
            return False
        request = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        if (await client.post("/generate", json=request)).status_code != httpx.codes.OK:
            return False
        if on_cpu:  # there each flush of the cache collects garbage: half a second, if it looks at all that was imported
            await client.post("/freeze_gc")
    except httpx.TransportError:
        return False
    return True

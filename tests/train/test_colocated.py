"""Servers that share the trainer's machine, in turns: asleep while the policy learns, awake whenever they are asked.

On a CPU a server that sleeps keeps its memory; that it sleeps, and how it is woken, is the same.
"""

import asyncio
import threading
from pathlib import Path

from megatron_rl.observe.journal import Journal
from megatron_rl.rollout.client import Client, Sampling
from megatron_rl.rollout.replies import Generation
from megatron_rl.train.run import train
from tests.rollout.talk import PROMPT, talk
from tests.servers import TinyServer
from tests.train.runs import learned, run_settings, state
from tests.train.test_loop import CLOSE, Notes, ages

COLOCATED = {"placement": "colocated", "probe_seconds": 0.2}


class Stranger:
    """Somebody else beside a run: notes what the server says of its weights, and asks for a response whenever it sleeps."""

    def __init__(self, server: TinyServer) -> None:
        self.seen: list[int | str] = []
        self.responses: list[Generation] = []
        self._server = server
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: talk(server, self._watch))

    def __enter__(self) -> "Stranger":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    async def _watch(self, client: Client) -> None:
        asked: list[asyncio.Task[Generation]] = []
        while not self._end.is_set():
            info = await client.model_info()
            seen = info.state if info.version is None else info.version
            if not self.seen or self.seen[-1] != seen:
                self.seen.append(seen)
                if seen == "asleep":
                    asked.append(asyncio.create_task(client.generate(PROMPT, Sampling(2, ignore_end=True))))
            await asyncio.sleep(0.003)
        self.responses = await asyncio.gather(*asked)


def test_servers_sleep_while_the_policy_learns(tiny_server: TinyServer, tmp_path: Path) -> None:
    talk(tiny_server, Client.sleep)  # so a killed run has left it
    folder = tmp_path / "run"
    settings = run_settings(tiny_server, folder, servers=COLOCATED, evaluation={"every": 2, "prompts": 3, "samples": 2})
    notes = Notes()
    with Stranger(tiny_server) as stranger:
        train(settings, observers=[Journal(folder), notes])
    # What it says of its weights, transitions aside, which a look may miss.
    assert [seen for seen in stranger.seen if seen not in ("unsettled", "unfinished")][-9:] == [
        0, "asleep", 1, "asleep", 2, "asleep", 3, "asleep", 4,
    ]  # fmt: skip
    # Who asks a server that sleeps waits for the weights that wake it.
    assert [[span.version for span in response.spans] for response in stranger.responses[-4:]] == [[1], [2], [3], [4]]
    assert ages(folder / "bank") == [0, 0, 0, 0]
    assert all(record.metrics["mismatch_max"] < CLOSE for record in notes.steps)
    assert all("sleep" in {span.name for span in record.spans} for record in notes.steps)
    assert [found.step for found in notes.evaluations] == [0, 2, 4]

    # It learns what it would beside servers of their own, bit for bit.
    separate = run_settings(tiny_server, tmp_path / "separate", bank={"replay": folder / "bank"})
    train(separate, observers=[Journal(tmp_path / "separate")])
    assert learned(tmp_path / "separate") == learned(folder)
    assert state(tmp_path / "separate", 4) == state(folder, 4)
    talk(tiny_server, lambda client: client.update_from_disk(str(tiny_server.model), 0))

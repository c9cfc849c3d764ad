"""Runs of reinforcement learning on a real server."""

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from megatron_rl.config.errors import SettingsError
from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.data.packing import CostModel
from megatron_rl.observe.journal import Journal
from megatron_rl.observe.records import EvaluationRecord, RunRecord, StepRecord
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.train.evaluation import Evaluator
from megatron_rl.train.run import train
from tests.servers import TinyServer
from tests.train.runs import Run, learned, metrics, run_settings, state, written

CLOSE = 1e-4  # log-probs in float32, by the server's kernels and the policy's


class Notes:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvaluationRecord] = []
        self.begun: list[int] = []
        self.ended = False

    def started(self, run: RunRecord, step: int) -> None:
        self.begun.append(step)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def evaluated(self, record: EvaluationRecord) -> None:
        self.evaluations.append(record)

    def finished(self) -> None:
        self.ended = True


def ages(bank: Path) -> list[int]:
    """For each step, how many updates old its oldest sample is."""
    with BankReader(bank) as reader:
        tables = {step: reader.step(step).plan() for step in reader.steps()}
    return [step - min(table.column("oldest_version").to_pylist()) for step, table in tables.items()]


def flops(folder: Path, step: int) -> float:
    """Of one pass over a step's samples."""
    model = CostModel.of(read_architecture(load_settings(folder / "settings.yaml").policy.config))
    with BankReader(folder / "bank") as reader:
        return float(model.cost(reader.step(step).plan().column("length").to_numpy()).sum())


def test_in_turns(tiny_server: TinyServer, tmp_path: Path) -> None:
    """Sampling, learning and publishing take turns: each step is sampled from the weights of the step before, all of them."""
    folder = tmp_path / "run"
    evaluation = {"every": 3, "prompts": 3, "samples": 2}
    checkpoint = {"every": 2, "export_every": 4, "export_dtype": "float32"}
    settings = run_settings(tiny_server, folder, evaluation=evaluation, checkpoint=checkpoint, device={"tflops": 0.05})
    notes = Notes()
    assert train(settings, observers=[Journal(folder), notes]).step == 4
    assert (notes.begun, notes.ended, [record.step for record in notes.steps]) == ([0], True, [0, 1, 2, 3])
    assert ages(folder / "bank") == [0, 0, 0, 0]
    # Servers had the very weights that `old` is of: the two agree on what was sampled, though every step moves the policy.
    for record in notes.steps:
        assert record.metrics["mismatch_max"] < CLOSE
        assert record.metrics["old_k3"] > 0 and record.metrics["grad_norm"] > 0
        phases = {span.name for span in record.spans}
        assert {"wait", "sample", "old", "update"} <= phases
        assert record.metrics["rate/mfu"] == pytest.approx(
            3 * flops(folder, record.step) / record.metrics["seconds/update"] / 5e10
        )
    assert [(found.step, found.name) for found in notes.evaluations] == [(step, "arithmetic") for step in (0, 3, 4)]
    for found in notes.evaluations:
        assert "avg@2" in found.metrics and found.results is not None and (folder / found.results).is_file()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    export, last = (folder / kind / "step_00000004" for kind in ("exports", "checkpoints"))
    # What a checkpoint has behind it is done: a run that is killed between the two would else never export.
    assert (export / "model.safetensors").stat().st_mtime_ns < (last / "manifest.json").stat().st_mtime_ns

    async def version() -> int | None:
        async with tiny_server.client() as client:
            return (await client.model_info()).version

    assert asyncio.run(version()) == 4  # evaluated at the end

    # The same steps, from the bank alone.
    replayed = run_settings(
        tiny_server, tmp_path / "replayed", bank={"replay": folder / "bank"}, servers={"urls": ["http://127.0.0.1:9"]}
    )
    train(replayed, observers=[Journal(tmp_path / "replayed")])
    assert learned(tmp_path / "replayed") == learned(folder)
    assert state(tmp_path / "replayed", 4) == state(folder, 4)

    # Killed in its last moment, all that is left to do is to tidy up.
    half = [folder / "checkpoints" / "step_00000002.deleted", folder / "exports" / "step_00000003.partial"]
    for each in half:
        each.mkdir()
    assert train(settings, resume=True).step == 4
    assert not any(each.exists() for each in half)

    # Killed before its first checkpoint, a run begins with what its bank has. Servers get the first weights all the same.
    again = run_settings(tiny_server, tmp_path / "again", evaluation={"every": 4, "prompts": 2, "samples": 1})
    shutil.copytree(folder / "bank", tmp_path / "again" / "bank")
    notes = Notes()
    train(again, resume=True, observers=[Journal(tmp_path / "again"), notes])
    assert [found.step for found in notes.evaluations] == [0, 4]
    assert learned(tmp_path / "again") == learned(folder)


@pytest.mark.parametrize("told", [2, 4])
def test_an_evaluation_that_was_stopped_is_done_by_the_resumed_run(
    tiny_server: TinyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    """The last one too, when no step is left to do; and no other again."""
    folder = tmp_path / "run"
    settings = run_settings(tiny_server, folder, evaluation={"every": 2, "prompts": 2, "samples": 1})
    evaluate = Evaluator.evaluate

    async def stopped(self: Evaluator, step: int | None = None) -> dict[str, float]:
        if step == told:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(3600)
        return await evaluate(self, step)

    first, then, last = Notes(), Notes(), Notes()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", stopped)
        assert train(settings, observers=[first]).step == told
    assert not first.ended
    assert train(settings, resume=True, observers=[then]).step == 4
    assert [found.step for found in (*first.evaluations, *then.evaluations)] == [0, 2, 4]
    assert [record.step for record in (*first.steps, *then.steps)] == [0, 1, 2, 3] and then.ended
    assert train(settings, resume=True, observers=[last]).step == 4
    assert last.begun == []


def test_ahead(tiny_server: TinyServer, tmp_path: Path) -> None:
    """Sampling runs ahead, by no more than it may."""
    settings = run_settings(tiny_server, tmp_path / "run", sampling={"ahead": 2}, run={"steps": 6})
    notes = Notes()
    train(settings, observers=[notes])
    assert 0 < max(ages(tmp_path / "run" / "bank")) <= 2
    assert [record.metrics["staleness/max"] for record in notes.steps] == ages(tmp_path / "run" / "bank")


class Swap:
    """An observer that takes a run's only server away after a step, and gives it back with other weights."""

    def __init__(self, server: TinyServer, file: Path) -> None:
        self.server, self.file = server, file

    def started(self, run: RunRecord, step: int) -> None:
        return

    def step(self, record: StepRecord) -> None:
        if record.step != 1:
            return

        async def reload() -> None:
            async with self.server.client() as client:
                await client.pause("abort")
                await client.update_from_disk(str(self.server.other), 0)
                await client.resume()

        self.file.write_text("")
        time.sleep(1.0)  # several looks at the file
        asyncio.run(reload())
        self.file.write_text(self.server.server.url)

    def evaluated(self, record: EvaluationRecord) -> None:
        return

    def finished(self) -> None:
        return


def test_a_server_that_comes_back_gets_the_present_weights(tiny_server: TinyServer, tmp_path: Path) -> None:
    """As one that was killed and started anew. Nobody else could sample, so the step would wait for ever."""
    file = tmp_path / "urls"
    file.write_text(tiny_server.server.url)
    settings = run_settings(tiny_server, tmp_path / "run", servers={"urls": [], "urls_file": file, "probe_seconds": 0.2})
    notes = Notes()
    train(settings, observers=[notes, Swap(tiny_server, file)])
    assert [record.step for record in notes.steps] == [0, 1, 2, 3]
    assert all(record.metrics["mismatch_max"] < CLOSE for record in notes.steps)


def test_first_done(tiny_server: TinyServer, tmp_path: Path) -> None:
    """Partial rollouts: responses that a step did not wait for go on in the next, under other weights."""
    settings = run_settings(
        tiny_server, tmp_path / "run", sampling={"partial": True, "over_sampling": 2.0, "stop_token_ids": [3]}
    )
    notes = Notes()
    train(settings, observers=[notes])
    assert [record.step for record in notes.steps] == [0, 1, 2, 3]
    assert max(record.metrics["staleness/max"] for record in notes.steps) >= 1


def test_killed_runs_go_on_as_if_nothing_had_been(tiny_server: TinyServer, tmp_path: Path) -> None:
    """Killed again and again, and resumed: what it learned is what an uninterrupted run learns from the same samples."""
    folder, log, victims = tmp_path / "run", tmp_path / "log", ("a rank", "everything", "SIGTERM")
    layout = {"world_size": 2, "expert": 2}
    settings = run_settings(
        tiny_server, folder, layout=layout, checkpoint={"every": 2}, sampling={"ahead": 1}, run={"steps": 3 * len(victims) + 4}
    )
    run = Run(written(settings), log=log)
    for number, victim in enumerate(victims):
        run.until(folder, 3 * number + 2)
        assert run.process.poll() is None, run.said
        first, *others = run.ranks()
        match victim:
            case "everything":
                run.kill(run.process.pid, first, *others)
            case "a rank":
                run.kill(others[-1])
            case "SIGTERM":
                run.process.terminate()
        code = run.end()
        assert code == {"everything": -signal.SIGKILL, "SIGTERM": 143}.get(victim, 128 + signal.SIGKILL)
        if victim == "a rank":  # the other rank's words are those of somebody whom it has left
            assert "rank 1 was killed (SIGKILL)" in run.said
        if victim == "SIGTERM":
            assert "saved; go on with" in run.said
            assert (folder / "checkpoints" / f"step_{len(metrics(folder)):08}").is_dir()
        run = Run("--resume", str(folder), log=log)
    assert run.end() == 0, run.said
    assert "Traceback" not in run.said.rpartition("resumed at step")[2]
    assert [line["step"] for line in metrics(folder)] == list(range(settings.run.steps))

    whole = settings.model_copy(update={"bank": settings.bank.model_copy(update={"replay": folder / "bank"})})
    whole = whole.model_copy(update={"run": settings.run.model_copy(update={"directory": tmp_path / "whole"})})
    assert Run(written(whole), log=tmp_path / "whole.log").end() == 0
    assert learned(tmp_path / "whole") == learned(folder)
    assert state(tmp_path / "whole", settings.run.steps) == state(folder, settings.run.steps)


def test_a_bank_without_the_step_is_refused(tiny_server: TinyServer, tmp_path: Path) -> None:
    Bank(tmp_path / "bank").close()
    settings = run_settings(tiny_server, tmp_path / "run", bank={"replay": tmp_path / "bank"})
    with pytest.raises(SettingsError, match=r"it has no step 0 \(it has none\)"):
        train(settings)


def test_the_command_refuses_before_anything_starts(tiny_server: TinyServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = written(run_settings(tiny_server, folder))
    folder.mkdir()
    (folder / "settings.yaml").write_text("")
    for number, (arguments, message) in enumerate(
        [
            ([file], "a run is there already. Continue it with `megatron-rl train --resume"),
            (["--resume", str(tmp_path)], "there is no run in it"),
            ([file, "--resume", str(folder)], "Give either CONFIG or --resume RUN_DIR"),
        ]
    ):
        run = Run(*arguments, log=tmp_path / f"log{number}")
        assert run.end() == 2 and message in run.said, run.said

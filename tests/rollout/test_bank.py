"""The bank gives back what it was given, to us and to programs that know nothing of us; and it says no clearly."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.config.data_settings import BankSettings
from megatron_rl.config.errors import BankError
from megatron_rl.rollout.bank import files
from megatron_rl.rollout.bank.codec import decode_group, encode_group
from megatron_rl.rollout.bank.reader import BankReader
from megatron_rl.rollout.bank.sealed import SealedStep, write_step
from megatron_rl.rollout.bank.writer import Bank
from megatron_rl.types import Group
from tests.rollout.banks import contents, exact, groups, made

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    with Bank(tmp_path / "bank") as opened:
        yield opened


# -- round trips -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(groups("a"))
def test_any_group_survives_the_log(group: Group) -> None:
    assert exact(decode_group(encode_group(group))) == exact(group)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.tuples(groups("a"), groups("b"), groups("ü/3#17")))
def test_any_groups_survive_sealing_and_every_choice_of_rows(members: tuple[Group, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.parquet"
        names = {name for group in members for sample in group.samples for name in sample.rewards}
        write_step(path, 4, members, names)
        with SealedStep(path) as sealed:
            assert [exact(group) for group in sealed.groups()] == [exact(group) for group in members]
            samples = [sample for group in members for sample in group.samples]
            order = list(range(len(samples)))[::-1]
            assert [exact(sample) for sample in sealed.samples(order)] == [exact(samples[index]) for index in order]
            assert sealed.lengths().tolist() == [sample.length for sample in samples]
            plan = sealed.plan()
            assert plan["loss_tokens"].to_pylist() == [int(sample.loss_mask.sum()) for sample in samples]
            assert plan["prompt_length"].to_pylist() == [sample.prompt_length for sample in samples]
            assert plan["group"].to_pylist() == [group.key for group in members for _ in group.samples]


def test_half_a_surrogate_pair_is_written_as_its_number(bank: Bank) -> None:
    group = made("a")
    broken = replace(group, samples=(replace(group.samples[0], failure="bad \ud800 byte"), group.samples[1]))
    bank.append(broken)
    assert bank.read("a").samples[0].failure == r"bad \ud800 byte"
    bank.seal(0)
    assert next(bank.sealed(0).groups()).samples[0].failure == r"bad \ud800 byte"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.array([1, -1]), "log_probs": np.zeros(2, np.float32)}, "token ids lie in 0 to 2147483647"),
        ({"tokens": np.array([1, 2**31]), "log_probs": np.zeros(2, np.float32)}, "token ids lie in"),
        ({"log_probs": np.zeros(3, np.float32)}, "3 log-probs for"),
        ({"routing": np.zeros((1, 1, 1), np.int64)}, "must be uint8 or uint16"),
    ],
)
def test_what_could_not_be_read_back_is_refused(bank: Bank, changes: dict[str, Any], message: str) -> None:
    group = made("a")
    with pytest.raises(BankError, match=f"group a cannot be kept: .*{message}"):
        bank.append(replace(group, samples=(replace(group.samples[0], **changes),)))
    with pytest.raises(BankError, match=r"group a cannot be kept: .*not JSON serializable. Prompt fields"):
        bank.append(replace(group, prompt=replace(group.prompt, fields={"when": object()})))
    with pytest.raises(BankError, match="group a cannot be kept: it has no samples"):
        bank.append(replace(group, samples=()))
    bank.append(group)  # the bank is none the worse
    assert exact(bank.read("a")) == exact(group)


# -- others open the files ---------------------------------------------------------------------------------------------


def test_datasets_pandas_and_pyarrow_open_a_sealed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [made("a"), replace(made("b"), samples=(replace(made("b").samples[0], routing=None, rewards={"exact": 1.0}),))]
    with Bank(tmp_path / "bank") as bank:
        for group in members:
            bank.append(group)
        bank.seal(0, decode=lambda ids: " ".join(map(str, ids)))
    path = tmp_path / "bank/steps/step_00000000.parquet"
    samples = [sample for group in members for sample in group.samples]

    frame = pandas.read_parquet(path)
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    table = pq.read_table(path)
    for rows in (frame.to_dict("records"), list(loaded), table.to_pylist()):
        for row, sample in zip(rows, samples, strict=True):
            assert list(row["tokens"]) == sample.tokens.tolist()
            assert np.array_equal(np.asarray(row["log_probs"], dtype=np.float32), sample.log_probs)
            assert list(row["loss_mask"]) == sample.loss_mask.tolist()
            assert [dict(segment) for segment in row["segments"]] == [vars(segment) for segment in sample.segments]
            assert row["reward"] == sample.reward and row["reward_exact"] == sample.rewards["exact"]
            assert row["response_text"] == " ".join(map(str, sample.tokens[sample.prompt_length :]))
            if sample.routing is not None:
                routing = np.frombuffer(row["routing"], row["routing_dtype"]).reshape(row["routing_shape"])
                assert np.array_equal(routing, sample.routing)
    assert json.loads(table["prompt_fields"][0].as_py()) == {"answer": "a"}
    assert table["reward_format"].to_pylist() == [0.5, 0.5, None]
    assert frame["oldest_version"].tolist() == [0, 0, 0] and frame["newest_version"].tolist() == [1, 1, 1]


def test_columns_of_others_are_kept_and_a_newer_format_is_refused(bank: Bank) -> None:
    bank.append(made("a"))
    bank.seal(0)
    path = bank.path / "steps/step_00000000.parquet"
    table = pq.read_table(path)
    wider = table.append_column("judge", [["good", "bad"]])
    pq.write_table(wider, path)
    with bank.sealed(0) as sealed:
        assert [exact(group) for group in sealed.groups()] == [exact(made("a"))]
        assert sealed.columns(["judge", "length"])["judge"].to_pylist() == ["good", "bad"]
        with pytest.raises(BankError, match=r"has no column juge. It has group, step.*judge"):
            sealed.columns(["juge"])
    about = json.loads(table.schema.metadata[b"megatron_rl.bank"]) | {"format": 2}
    pq.write_table(table.replace_schema_metadata({"megatron_rl.bank": json.dumps(about)}), path)
    with pytest.raises(BankError, match=r"has format 2; this program reads up to 1\. Upgrade"):
        bank.sealed(0)
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(BankError, match="does not say which format it has"):
        bank.sealed(0)


def test_a_newer_bank_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    with Bank(tmp_path / "bank", tokenizer="some/model") as bank:
        assert bank.tokenizer == "some/model"
    about = tmp_path / "bank/bank.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 2'))
    for open_it in (Bank, BankReader):
        with pytest.raises(BankError, match="has format 2; this program reads up to 1"):
            open_it(tmp_path / "bank")
    about.write_text("{")
    with pytest.raises(BankError, match="cannot be read"):
        BankReader(tmp_path / "bank")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("chapter 1")
    with pytest.raises(BankError, match=r"is not a bank and holds other files \(thesis.tex\)"):
        Bank(tmp_path / "other")
    with pytest.raises(BankError, match=r"other is not a bank: it has no bank\.json"):
        BankReader(tmp_path / "other")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(BankError, match="cannot be read as a sealed step"):
        SealedStep(tmp_path / "bad.parquet")


# -- reading a part ----------------------------------------------------------------------------------------------------


def test_a_rank_reads_little_more_than_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    members = [made(str(number), samples=4, length=5000) for number in range(32)]
    write_step(path, 0, members, {"exact", "format"})
    size = path.stat().st_size
    samples = [sample for group in members for sample in group.samples]
    with SealedStep(path) as sealed:
        footer = sealed.bytes_read
        assert sealed.lengths().tolist() == [sample.length for sample in samples]
        assert sealed.bytes_read < size / 10
        before = sealed.bytes_read
        own = range(40, 56)  # an eighth of the rows
        assert [exact(sample) for sample in sealed.samples(own)] == [exact(samples[row]) for row in own]
        assert (sealed.bytes_read - before) < size / 4
        assert size > 5_000_000 and footer < size / 10
        before = sealed.bytes_read
        assert all(sample.routing is None for sample in sealed.samples(own, routing=False))
        assert sealed.bytes_read - before < size / 5
        with pytest.raises(BankError, match="has rows 0 to 127, and row 128 was asked for"):
            sealed.samples([0, 128])


# -- life of a bank ----------------------------------------------------------------------------------------------------


def test_carried_groups_go_on_until_they_are_finished(tmp_path: Path) -> None:
    half = replace(made("a"), samples=(replace(made("a").samples[0], finish="abort"),))
    with Bank(tmp_path) as bank:
        bank.carry(made("a", samples=1)).result()
        bank.carry(half).result()
        bank.carry(replace(made("b"), samples=())).result()  # aborted before its first token
        bank.append(made("c"))
        bank.seal(0)  # which rewrites the log
        assert bank.carried() == ["a", "b"]
    with Bank(tmp_path) as bank:
        assert bank.carried() == ["a", "b"] and exact(bank.read("a")) == exact(half)
        bank.append(made("a", step=1))
        bank.discard("b", "its environment is gone").result()
        assert bank.carried() == []
        with pytest.raises(BankError, match="group a is finished already"):
            bank.carry(half).result()
        with pytest.raises(BankError, match="group b cannot be discarded: it is neither waiting nor carried"):
            bank.discard("b", "again").result()
    with Bank(tmp_path) as bank:
        assert bank.carried() == [] and bank.waiting() == ["a"]
    with BankReader(tmp_path) as reader:
        assert [group.key for group in reader.waiting()] == ["a"] and not list(reader.carried())


def test_keys_are_unique_for_good(tmp_path: Path) -> None:
    with Bank(tmp_path) as bank:
        twice = [bank.submit(made("a")) for _ in range(2)]
        assert twice[0].exception() is None
        assert "keys are unique" in str(twice[1].exception()) or "being finished" in str(twice[1].exception())
        bank.seal(0)
        with pytest.raises(BankError, match="finished already"):
            bank.append(made("a", step=1))
    with Bank(tmp_path) as bank, pytest.raises(BankError, match="finished already"):
        bank.append(made("a", step=1))


def test_sealing_takes_what_it_is_told_in_rising_order(bank: Bank) -> None:
    for key, step in (("a", 0), ("b", 1), ("c", 0), ("d", 2)):
        bank.append(made(key, step=step))
    assert bank.waiting(0) == ["a", "c"]
    bank.seal(3, ["d", "a"])
    with bank.sealed(3) as sealed:
        assert sealed.keys() == ["d", "a"] and sealed.step == 3
    assert bank.waiting() == ["b", "c"]
    for arguments, message in (
        ((3,), "step 3 cannot be sealed: step 3 is. Steps are sealed in rising order"),
        ((4,), "no finished group is waiting for it"),
        ((4, ["b", "a"]), "group a is not waiting"),
    ):
        with pytest.raises(BankError, match=message):
            bank.seal(*arguments)
    with pytest.raises(BankError, match=r"has no sealed step 9\. It has 3"):
        bank.sealed(9)
    assert contents(bank.path).keys() == {"a", "b", "c", "d"}


@pytest.mark.parametrize(("limits", "left"), [({"keep_steps": 2}, [3, 4]), ({"keep_bytes": 1}, [4]), ({}, [0, 1, 2, 3, 4])])
def test_retention_keeps_the_newest(tmp_path: Path, limits: dict[str, int], left: list[int]) -> None:
    with Bank(tmp_path, BankSettings.model_validate(limits)) as bank:
        for step in range(5):
            bank.append(made(str(step), step=step))
            bank.seal(step)
        assert bank.sealed_steps() == left
    with Bank(tmp_path, BankSettings(keep_steps=1)) as bank:
        assert bank.sealed_steps() == [4]


def test_many_tasks_wait_for_few_synchronisations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sync = files.sync

    def counted(descriptor: int) -> None:
        calls.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(files, "sync", counted)

    async def keep(bank: Bank) -> None:
        await asyncio.gather(*(bank.add(made(str(number))) for number in range(200)))

    with Bank(tmp_path, BankSettings(gather_seconds=0.05)) as bank:
        calls.clear()
        asyncio.run(keep(bank))
        assert len(calls) < 20
        assert len(bank.waiting()) == 200
    assert contents(tmp_path).keys() == {str(number) for number in range(200)}


def test_nothing_is_reported_before_it_is_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bank(tmp_path) as bank:
        states: list[list[bool]] = []
        sync = files.sync
        futures: list[Future[None]] = []

        def watched(descriptor: int) -> None:
            states.append([future.done() for future in futures])
            sync(descriptor)

        monkeypatch.setattr(files, "sync", watched)
        futures.append(bank.submit(made("a")))
        futures[0].result()
        assert states and not any(any(state) for state in states)


@pytest.mark.parametrize("operation", ["write_all", "sync"])
def test_a_disk_that_fails_is_told_and_nothing_reported_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with Bank(tmp_path) as bank:
        bank.append(made("a"))

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as broken:
            broken.setattr(files, operation, full)
            with pytest.raises(BankError, match=r"cannot be written: .*No space left.*Make room"):
                bank.append(made("b"))
        with pytest.raises(BankError, match="cannot be written"):  # what is on the disk now is known after opening alone
            bank.append(made("c"))
        with pytest.raises(BankError, match="cannot be written"):
            bank.seal(0)
    assert exact(contents(tmp_path)["a"]) == exact(made("a"))
    with Bank(tmp_path) as bank:
        assert set(bank.waiting()) <= {"a", "b"}  # b was whole when only its synchronisation failed
        bank.append(made("c"))
        bank.seal(0)


def test_a_closed_bank_keeps_what_was_submitted_and_takes_no_more(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    futures = [bank.submit(made(str(number))) for number in range(30)]
    bank.close()
    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(BankError, match="closed"):
        bank.append(made("late"))
    assert len(contents(tmp_path)) == 30


def test_readers_see_every_group_while_steps_are_sealed(tmp_path: Path) -> None:
    with Bank(tmp_path) as bank:
        for step in range(4):
            for key in "ab":
                bank.append(made(f"{step}{key}", step=step))
        with BankReader(tmp_path) as early:  # opened before, read after
            bank.seal(0)
            assert len([group.key for group in early.waiting()]) == 8
        bank.seal(1)
        assert len(contents(tmp_path)) == 8


def test_the_bank_imports_no_torch() -> None:
    program = (
        "import sys, pathlib\nfrom megatron_rl.rollout.bank.writer import Bank\n"
        "from tests.rollout.banks import made\n"
        "with Bank(pathlib.Path(sys.argv[1])) as bank:\n    bank.append(made('a'))\n    bank.seal(0)\n"
        "    list(bank.sealed(0).groups())\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pickle5', 'dill'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Programs that are rewarded for passing tests. They run behind the walls of `rewards.sandbox`."""

import os
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.errors import SettingsError
from megatron_rl.rewards import cases
from megatron_rl.rewards.base import AwaitedReward, Options, column
from megatron_rl.rewards.cases import Comparison
from megatron_rl.rewards.sandbox.probe import MEANING, Limit, stand
from megatron_rl.rewards.sandbox.runner import Limits, Program, SandboxError, Walls, run
from megatron_rl.types import Prompt, Sample

LEAST_MEMORY = 64  # MiB of a process, below which an interpreter hardly starts
SHORTEST = 0.1  # seconds that are worth starting a program for


class CodeOptions(Options):
    tests: str = Field("tests", description="Column with the tests.")
    style: Literal["stdio", "assert"] = Field(
        "stdio", description="stdio: what is printed for what is read; assert: statements that must not raise."
    )
    input: str = Field("input", description="stdio: what a test calls that which the program reads.")
    output: str = Field("output", description="stdio: what a test calls that which it shall print.")
    compare: Comparison = Field("tokens", description="stdio: compare words, lines (blanks at their ends apart), or all.")
    tolerance: NonNegativeFloat = Field(0.0, description="stdio: difference of numbers that does not count; relative above 1.")
    before: str | None = Field(None, description="assert: column with code to put before the program, imports say.")
    entry_point: str | None = Field(
        None, description="assert: column with a function's name that the tests' `check` is called with."
    )
    block: Literal["last", "first", "whole"] = Field("last", description="Which ``` block of the response is the program.")
    score: Literal["all", "fraction"] = Field("all", description="1 where all tests pass, or the part of them that does.")
    most_tests: PositiveInt | None = Field(None, description="Run only the first so many tests; null for all.")
    cpu: PositiveInt = Field(10, description="Seconds of computing, of each process of a run.")
    wall: PositiveFloat = Field(10.0, description="Seconds of a run: of one test (stdio), of all (assert).")
    total: PositiveFloat = Field(60.0, description="Seconds of all runs of a sample; tests after that are not passed.")
    memory: PositiveInt = Field(512, description="MiB of memory of a run, dealt out evenly to its processes.")
    processes: PositiveInt = Field(1, description="Processes and threads of a run; 1: one process, with threads.")
    scratch: NonNegativeInt = Field(0, description="MiB that a run may write, below /scratch; 0: it can write no file at all.")
    said: PositiveInt = Field(1024, description="KiB that a run may print.")
    packages: bool = Field(False, description="Whether it may import the packages of this environment, numpy say.")
    concurrency: PositiveInt | None = Field(None, description="Runs at once; default: as many as cores.")
    unenforced: tuple[Limit, ...] = Field(
        (), description="Limits that may go unenforced where the machine cannot hold them. Know what you do."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.memory < LEAST_MEMORY * self.processes:
            raise ValueError(f"`memory` = {self.memory} is below {LEAST_MEMORY} MiB for each of {self.processes} `processes`")
        if self.style == "stdio" and (self.before or self.entry_point):
            raise ValueError("`before` and `entry_point` belong to style assert")
        return self

    def limits(self, wall: float) -> Limits:
        return Limits(self.cpu, wall, self.memory << 20, self.processes, self.scratch << 20, self.said << 10)


class Code(AwaitedReward[CodeOptions]):
    """1 where the Python program in the response passes its tests, or the part of them that it passes."""

    name: ClassVar[str] = "code"
    takes: ClassVar[type[Options]] = CodeOptions
    example: ClassVar[str] = "{name: code, options: {tests: cases, wall: 5, memory: 256}}"

    def __init__(self, options: CodeOptions) -> None:
        super().__init__(options)
        self.concurrency = options.concurrency or len(os.sched_getaffinity(0))
        self.walls: Walls | None = None

    def columns(self) -> frozenset[str]:
        named = (self.options.tests, self.options.before, self.options.entry_point)
        return frozenset(name for name in named if name is not None)

    async def open(self) -> None:
        """Find the walls that stand here. A limit that does not is refused, unless the settings allow it."""
        try:
            standing = await stand()
        except SandboxError as error:
            raise SettingsError(f"code: {error}") from error
        missing = standing.missing(processes=self.options.processes, scratch=self.options.scratch)
        if problems := [limit for limit in missing if limit not in self.options.unenforced]:
            raise SettingsError("\n".join(refusals(problems, standing.walls)))
        self.walls = standing.walls

    async def score(self, prompt: Prompt, text: str, sample: Sample) -> float:
        tests = column(prompt, self.options.tests)
        program = cases.program(text, self.options.block)
        if self.options.style == "stdio":
            checks = cases.cases(tests, self.options.input, self.options.output)[: self.options.most_tests]
            return 0.0 if program is None else await self._stdio(program, checks)
        statements = cases.assertions(tests)[: self.options.most_tests]
        if self.options.entry_point is not None:
            call = f"check({column(prompt, self.options.entry_point)})"
            statements = [f"{statement}\n{call}" for statement in statements]
        before = "" if self.options.before is None else f"{column(prompt, self.options.before)}\n"
        return 0.0 if program is None else await self._assert(before + program, statements)

    async def _stdio(self, program: str, checks: list[cases.Case]) -> float:
        """One run a test. Where all count, the first that fails decides."""
        assert self.walls is not None, "open() comes first"
        passed, deadline = 0, time.monotonic() + self.options.total
        for case in checks:
            wall = min(self.options.wall, deadline - time.monotonic())
            if wall < SHORTEST:
                break
            job = Program(program, case.stdin, packages=self.options.packages)
            outcome = await run(job, self.options.limits(wall), self.walls)
            right = outcome.well and cases.same(outcome.stdout, case.expected, self.options.compare, self.options.tolerance)
            passed += right
            if not right and self.options.score == "all":
                break
        return self._value(passed, len(checks))

    async def _assert(self, program: str, statements: list[str]) -> float:
        assert self.walls is not None, "open() comes first"
        job = Program(program, tests=tuple(statements), packages=self.options.packages)
        limits = self.options.limits(min(self.options.wall, self.options.total))
        outcome = await run(job, limits, self.walls)
        return self._value(len(outcome.passed & set(range(len(statements)))), len(statements))

    def _value(self, passed: int, count: int) -> float:
        return passed / count if self.options.score == "fraction" else float(passed == count)


def refusals(missing: list[Limit], walls: Walls) -> Iterator[str]:
    """Why a run cannot be held here, and what can be done."""
    advice: dict[Any, str] = {
        "scratch": "Set scratch: 0, so that programs write nothing",
        "many_processes": "Set processes: 1",
    }
    for limit in missing:
        fix = advice.get(limit, "Allow user namespaces, or Landlock (Linux 5.13) and seccomp, in the container")
        yield (
            f"code: this machine cannot enforce '{limit}' ({MEANING[limit]}) with {walls}. {fix}, or accept it with "
            f"unenforced: [{limit}]. `megatron-rl rewards --check` shows what holds."
        )

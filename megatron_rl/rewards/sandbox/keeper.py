"""The keeper of one run: reads a request on its standard input, runs the program behind walls, writes a report.

It is trusted and small, and stands between the sampler and the program: it feeds the program, reads what it says up to a limit,
ends it and all it has started when the time is up or the sampler is gone, and leaves only when no process of the run is left.
"""

import fcntl
import json
import marshal
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from megatron_rl.rewards.sandbox import kernel, walls

HIGH = 20  # descriptors are moved up here, out of the way of those that a program is given
PIECE = 1 << 16


class Run:
    """One program, from fork to the last of its processes."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request
        self.ended = ""
        self.report: dict[str, Any] = {"fault": None, "code": None, "signal": None, "cpu": 0.0, "memory": 0}
        self.heard = {"stdout": bytearray(), "stderr": bytearray(), "notes": bytearray(), "status": bytearray()}
        self.selector = selectors.DefaultSelector()
        self.child = 0
        self.gone = False  # reaped: its number may be another's by now

    def start(self) -> None:
        """Fork: into the program itself, or into the first process of a namespace, which forks it in turn."""
        read_input, self.feed = _pipe()
        inner, pipes = [read_input], {}
        for name in self.heard:
            pipes[name], end = _pipe()
            inner.append(end)
        job = _job(self.request)
        bells, bell = _pipe()
        signal.set_wakeup_fd(_unblocked(bell), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        descriptors, status = [*inner[:3], job, inner[3]], inner[4]
        apart = self.request["walls"]["namespaces"] != "none"
        if apart:
            walls.enter_namespaces(self.request["walls"]["namespaces"])
        self.child = os.fork()
        if self.child == 0:
            for end in (self.feed, *pipes.values()):  # or what the program reads would never end
                os.close(end)
            if apart:
                _guarded(status, lambda: _first_process(self.request, descriptors, status))
            _guarded(status, lambda: walls.become(self.request, descriptors))
        for end in (*inner, job):
            os.close(end)
        for name, descriptor in pipes.items():
            self.selector.register(_unblocked(descriptor), selectors.EVENT_READ, name)
        self.selector.register(_unblocked(bells), selectors.EVENT_READ, "bell")
        self.pending = memoryview(self.request["stdin"].encode(errors="replace"))
        self.selector.register(_unblocked(self.feed), selectors.EVENT_WRITE, "feed")

    def watch(self) -> None:
        """Until the child has ended, by itself or by us."""
        deadline = time.monotonic() + self.request["wall"]
        while not self._reaped():
            if not self.ended and time.monotonic() > deadline:
                self._end("wall")
            for key, _ in self.selector.select(max(0.0, min(deadline - time.monotonic(), 1.0)) if not self.ended else 1.0):
                self._attend(key)
        for key in list(self.selector.get_map().values()):  # what it said last
            if key.data in self.heard:
                self._listen(key)

    def _attend(self, key: selectors.SelectorKey) -> None:
        if key.data == "feed":
            self._feed()
        elif key.data == "bell":
            if signal.SIGTERM in os.read(key.fd, PIECE):
                self._end("stopped")
        else:
            self._listen(key)

    def _feed(self) -> None:
        try:
            self.pending = self.pending[os.write(self.feed, self.pending[:PIECE]) :]
        except BrokenPipeError:  # it reads no more
            self.pending = self.pending[:0]
        if not self.pending:
            self.selector.unregister(self.feed)
            os.close(self.feed)

    def _listen(self, key: selectors.SelectorKey) -> None:
        """Read all that is there. What is beyond the limit ends the run."""
        with suppress(BlockingIOError):
            while piece := os.read(key.fd, PIECE):
                self.heard[key.data] += piece
                if sum(map(len, self.heard.values())) > self.request["output"]:
                    self._end("output")
                    break
            else:
                self.selector.unregister(key.fd)

    def _end(self, reason: str) -> None:
        self.ended = self.ended or reason
        if not self.gone:
            os.kill(self.child, signal.SIGKILL)

    def _reaped(self) -> bool:
        pid, status, usage = os.wait4(self.child, os.WNOHANG)
        if pid == 0:
            return False
        self.gone = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child, signal.SIGKILL)  # where nothing forbids more processes: those that stayed in its group
        if self.request["walls"]["namespaces"] == "none":
            self.report |= _ending(status, usage)
        return True

    def result(self) -> dict[str, Any]:
        limit = self.request["output"]
        for line in self.heard.pop("status").decode().splitlines():
            self.report |= json.loads(line)
        for name, said in self.heard.items():
            self.report[name] = said[:limit].decode(errors="replace")
        ended = self.ended or ("exit" if self.report["signal"] is None else "signal")
        killed = self.report["signal"] in (signal.SIGKILL, signal.SIGXCPU)
        if ended == "signal" and killed and self.report["cpu"] > self.request["cpu"] - 0.5:
            ended = "cpu"
        return self.report | {"ended": ended}


def _first_process(request: Mapping[str, Any], descriptors: list[int], status: int) -> NoReturn:
    """Process 1 of a namespace: with it die all others there. It builds the root, starts the program, and buries the dead."""
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)
    walls.enter_root(request)
    kernel.prctl(kernel.DUMPABLE, 0)  # the program may be of the same user, and shall not look into this one
    program = os.fork()
    if program == 0:
        _guarded(status, lambda: walls.become(request, descriptors))
    for descriptor in descriptors:
        os.close(descriptor)
    while True:
        pid, ending, usage = os.wait4(-1, 0)
        if pid == program:
            os.write(status, json.dumps(_ending(ending, usage)).encode() + b"\n")
            os._exit(0)


def _guarded(status: int, act: Callable[[], NoReturn]) -> NoReturn:
    """A forked process never returns from here; why it could not do its work is told."""
    try:
        act()
    except BaseException as error:
        os.write(status, json.dumps({"fault": f"{type(error).__name__}: {error}"}).encode() + b"\n")
    os._exit(1)


def _ending(status: int, usage: Any) -> dict[str, Any]:
    code = os.waitstatus_to_exitcode(status)
    times = {"cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}
    return {"code": code if code >= 0 else None, "signal": -code if code < 0 else None, **times}


def _job(request: Mapping[str, Any]) -> int:
    """A file in memory, that nobody can change, with what the harness reads."""
    job = os.memfd_create("job", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(os.dup(job), "wb") as file:
        marshal.dump({name: request[name] for name in ("program", "tests", "secret", "packages")}, file)
    os.lseek(job, 0, os.SEEK_SET)
    fcntl.fcntl(job, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return _raised(job)


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    return _raised(read), _raised(write)


def _raised(descriptor: int) -> int:
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH)
    os.close(descriptor)
    return high


def _unblocked(descriptor: int) -> int:
    os.set_blocking(descriptor, False)
    return descriptor


def main(parent: int) -> None:
    kernel.prctl(kernel.PDEATHSIG, signal.SIGTERM)
    request = json.load(sys.stdin.buffer)
    if os.getppid() != parent:  # it went before we could ask to be told
        return
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")  # a courtesy: should the machine run out of memory, the run goes before the sampler does
    began = time.monotonic()
    run = Run(request | {"number": os.getpid()})
    try:
        run.start()
        run.watch()
        report = run.result()
    except OSError as error:
        report = run.report | {"ended": "fault", "fault": f"{type(error).__name__}: {error}"}
        report |= {name: "" for name in ("stdout", "stderr", "notes")}
    json.dump(report | {"wall": time.monotonic() - began}, sys.stdout)

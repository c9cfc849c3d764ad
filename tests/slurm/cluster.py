"""A real SLURM on this machine: its controller and several nodes on loopback, in a folder of their own.

Nothing of a system's SLURM is used but the programs: own keys, own configuration, free ports, no root needed, and every process
that was started ends with it.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rl.rollout.server import free_ports

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian keeps daemons
PATIENCE = 300.0  # seconds, far above what anything takes on a machine that does nothing else
MARK = "MEGATRON_RL_TEST_NODE"  # a variable by which a node's processes are known
OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")
CONFIGURATION = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
JobRequeue=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class Cluster:
    """Nodes n1, n2, …; jobs are submitted in this process's environment, which they inherit."""

    def __init__(self, place: Path, nodes: int = 3) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} not found: these tests need a real SLURM. Install it (Debian: apt-get install slurm-wlm "
                "munge), or run launch/test.sh, which does where it may."
            )
        self.place = place
        self.names = [f"n{number + 1}" for number in range(nodes)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(place / "slurm.conf"),
            "PATH": PATH,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # munged wants all users to be able to reach its socket, which they cannot in just any folder.
        self._secrets = tempfile.TemporaryDirectory(prefix="megatron-rl-munge-")
        self._munge = Path(self._secrets.name)

    def __enter__(self) -> Self:
        try:
            self._configure()
            files = [f"--{name}-file={self._munge / name}" for name in ("key", "pid", "log", "seed")]
            self._start("munged", "--foreground", f"--socket={self._munge / 'socket'}", *files)
            self.until("munge", (self._munge / "socket").exists)
            self._start("slurmctld", "-D")
            for name in self.names:
                self.start_node(name)
            self.until("all nodes", lambda: self.idle() == len(self.names))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Jobs first, then nodes, then the controller; what is left of them is killed."""
        for process in reversed(self._daemons.values()):
            if process.poll() is None:
                process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for each in self._processes(f"SLURM_CONF={self.place / 'slurm.conf'}"):
            _kill(each)
        self._secrets.cleanup()

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-N", name, node=name)

    def kill_node(self, name: str) -> None:
        """As if its power failed: its daemon and all that it has started, at once."""
        self._daemons.pop(f"slurmd {name}").kill()
        for each in {*self._processes(f"{MARK}={name}"), *self._processes(f"SLURMD_NODENAME={name}")}:
            _kill(each)

    def kill_rank(self, rank: int) -> bool:
        """A rank of the only job that runs, as if its machine had had no memory left; False where there is none yet."""
        ranks = set(self._processes(f"RANK={rank}")) & set(self._processes(f"SLURM_CONF={self.place / 'slurm.conf'}"))
        for each in ranks:
            _kill(each)
        return bool(ranks)

    def idle(self) -> int:
        return len(re.findall(r"State=IDLE(?!\S)", self.ask("scontrol", "show", "nodes")))

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def launch(self, *words: str) -> int:
        """`megatron-rl launch … --slurm --submit`; returns the job's number."""
        command = [sys.executable, "-m", "megatron_rl.cli", "launch", *words, "--slurm", "--submit"]
        answer = subprocess.run(command, cwd=self.place, env=self.environment, capture_output=True, text=True)
        found = re.search(r"^job (\d+) is submitted", answer.stdout, re.M)
        if found is None:
            raise RuntimeError(f"launch ended with {answer.returncode}:\n{answer.stdout}{answer.stderr}")
        return int(found[1])

    def ask(self, *words: str) -> str:
        return subprocess.run(words, cwd=self.place, env=self.environment, capture_output=True, text=True, check=True).stdout

    def of_job(self, job: int, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self.ask("scontrol", "show", "job", "--oneliner", str(job)))
        return found[1] if found else ""

    def ended(self, job: int, patience: float = PATIENCE) -> str:
        """Waits for the end of a job; returns its state and its exit code: `COMPLETED 0:0`."""
        self.until(f"the end of job {job}", lambda: self.of_job(job, "JobState") in OVER, patience)
        return f"{self.of_job(job, 'JobState')} {self.of_job(job, 'ExitCode')}"

    def until(self, what: str, there: Callable[[], bool], patience: float = PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while not there():
            for name, process in self._daemons.items():
                if process.poll() is not None:
                    said = (self.place / f"{name.replace(' ', '-')}.out").read_text(errors="replace")
                    raise RuntimeError(f"{name} ended with {process.returncode}:\n{said[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {patience:.0f} s for {what}; logs are in {self.place}\n{self._words()}")
            time.sleep(0.1)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        controller, *others = free_ports(1 + len(self.names))
        host = socket.gethostname()
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for name, port in zip(self.names, others, strict=True)
        ]
        (self.place / "state").mkdir(parents=True)
        self._munge.chmod(0o711)
        for name in self.names:
            (self.place / f"spool-{name}").mkdir()
        with open(os.open(self._munge / "key", os.O_WRONLY | os.O_CREAT, 0o400), "wb") as key:
            key.write(os.urandom(1024))
        places = {"place": self.place, "munge": self._munge}
        text = CONFIGURATION.format(host=host, port=controller, user=getpass.getuser(), nodes="\n".join(nodes), **places)
        (self.place / "slurm.conf").write_text(text)

    def _start(self, program: str, *arguments: str, node: str = "") -> None:
        name = f"{program} {node}".strip()
        with open(self.place / f"{name.replace(' ', '-')}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program, *arguments],
                env={**self.environment, MARK: node} if node else self.environment,
                executable=shutil.which(program, path=PATH),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us
            )

    def _processes(self, variable: str) -> Iterator[int]:
        """Those that have a variable in their environment, but this one."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if variable.encode() in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                    yield int(folder.name)
            except OSError:
                continue  # it has ended, or is somebody else's

    def _words(self) -> str:
        """The jobs' own logs, which say what went wrong."""
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.place.rglob("slurm-[0-9]*.log")))


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return

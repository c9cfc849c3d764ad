"""Programs that do harm, each with how its run may end and what it must not have said.

A program says FREE where it got what it must not get.
"""

from dataclasses import dataclass, field, replace

from megatron_rl.rewards.sandbox.runner import Limits

MEGABYTE = 1 << 20
SHORT = Limits(cpu=1, wall=1.5, memory=256 * MEGABYTE, output=64 << 10)  # for those that only the clock ends
LONG = Limits(cpu=1, wall=60.0, memory=256 * MEGABYTE, output=64 << 10)  # for those that end otherwise, on a busy machine too


@dataclass(frozen=True)
class Attack:
    text: str
    ended: tuple[str, ...]
    limits: Limits = LONG
    said: str = ""  # what it says where it was held
    needs: frozenset[str] = field(default_factory=frozenset)  # limits that must stand for it to be held
    once: bool = False  # it costs seconds, and what holds it is the same behind all walls


def several(count: int, wall: float = LONG.wall) -> Limits:
    return replace(LONG, processes=count, wall=wall)


ATTACKS = {
    "fork bomb": Attack("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", ("wall", "cpu", "signal")),
    "fork bomb with processes": Attack(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
        ("wall", "cpu", "signal"),
        several(4, SHORT.wall),
        needs=frozenset({"many_processes"}),
        once=True,
    ),
    "thread bomb": Attack(
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "    except (RuntimeError, MemoryError): pass\n",
        ("wall", "cpu", "signal"),
        once=True,
    ),
    "10 GB at once": Attack("a = bytearray(10 << 30)\nprint('FREE')", ("exit",), said="MemoryError"),
    "10 GB in pieces": Attack(
        "a = []\nfor _ in range(10 << 10): a.append(b'x' * (1 << 20))\nprint('FREE')", ("exit",), said="MemoryError"
    ),
    "10 GB over children": Attack(
        "import os, time\nkept = bytearray(b'x') * (40 << 20)\nfor _ in range(3):\n    if os.fork() == 0: break\n"
        "try:\n    kept += bytearray(b'x') * (64 << 20)\n    print('FREE')\nexcept MemoryError:\n    print('held')\n",
        ("exit",),
        several(4),
        said="held",
        needs=frozenset({"many_processes"}),
    ),
    "10 GB in shared memory": Attack(
        "import mmap, os, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "try:\n    a = mmap.mmap(-1, 10 << 30)\n    print('FREE')\nexcept OSError: pass\n"
        "if libc.shmget(0, ctypes.c_size_t(1 << 30), 0o1600) >= 0: print('FREE')\n"
        "try:\n    f = os.memfd_create('x')\n    os.ftruncate(f, 1 << 30)\n    print('FREE')\nexcept OSError: print('held')\n",
        ("exit",),
        said="held",
    ),
    "endless loop": Attack("while True: pass", ("cpu",), once=True),
    "endless loop against signals": Attack(
        "import signal\nfor n in signal.valid_signals():\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
        ("cpu",),
        once=True,
    ),
    "asleep for ever": Attack("import time\ntime.sleep(1e6)", ("wall",), SHORT),
    "asleep against SIGTERM": Attack(
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: time.sleep(99)",
        ("wall",),
        SHORT,
    ),
    "stopped": Attack("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", ("wall",), SHORT),
    "waiting for input": Attack("while True: input()", ("exit",), said="EOFError"),
    "huge output": Attack("while True: print('x' * 100000)", ("output",)),
    "huge errors": Attack("import sys\nwhile True: sys.stderr.write('x' * 100000)", ("output",)),
    "closed output, then asleep": Attack(
        "import os, time\nfor n in range(64):\n    try: os.close(n)\n    except OSError: pass\ntime.sleep(1e6)",
        ("wall",),
        SHORT,
    ),
    "daemon": Attack(
        "import os, time\ntry:\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            for n in range(3): os.close(n)\n            time.sleep(1e6)\n        os._exit(0)\n"
        "except OSError: pass\nprint('parent ends')",
        ("exit",),
        said="parent ends",
    ),
    "daemon with processes": Attack(
        "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(1e6)'])\n"
        "    os._exit(0)\ntime.sleep(0.3)\nprint('parent ends')",
        ("exit",),
        several(4),
        said="parent ends",
        needs=frozenset({"many_processes"}),
    ),
    "write outside": Attack(
        "import os\nfor place in ({folder!r}, '/tmp', '/var/tmp', '/dev/shm', '/', '/etc', os.getcwd()):\n"
        "    try:\n        open(os.path.join(place, 'megatron_rl_escape'), 'w').write('x')\n        print('FREE', place)\n"
        "    except OSError: pass\n"
        "for act in (os.truncate, os.chmod):\n    try:\n        act({own!r}, 0)\n        print('FREE', act)\n"
        "    except OSError: pass\n"
        "try:\n    os.unlink({own!r})\n    print('FREE')\nexcept OSError: print('held')\n",
        ("exit",),
        said="held",
    ),
    "read outside": Attack(
        "import os, sys\nfor place in ('/etc/passwd', '/etc/shadow', '/proc/self/environ', '/proc/1/cmdline', {own!r}):\n"
        "    try:\n        open(place).read()\n        print('FREE', place)\n    except OSError: pass\n"
        "for place in ('/', '/home', '/tmp', {folder!r}):\n    try:\n        found = set(os.listdir(place))\n"
        "        if found & {{'etc', 'home', 'root', 'own'}} - {{'etc', 'root'}}: print('FREE', place, found)\n"
        "    except OSError: pass\n"
        "print('held', dict(os.environ).keys() & {{'PATH', 'USER', 'PYTHONPATH'}})",
        ("exit",),
        said="held set()",
    ),
    "socket": Attack(
        "import socket\nfor family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):\n"
        "    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):\n        try:\n"
        "            socket.socket(family, kind)\n            print('FREE', family, kind)\n        except OSError: pass\n"
        "try:\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    print('FREE')\nexcept OSError: print('held')",
        ("exit",),
        said="held",
    ),
    "other processes": Attack(
        "import os, signal, ctypes, resource\n"
        "for pid in ({sampler}, os.getppid(), 1, -1):\n    try:\n        os.kill(pid, 0)\n"
        "        if pid in ({sampler},): print('FREE', pid)\n    except OSError: pass\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.ptrace(16, {sampler}, 0, 0) == 0: print('FREE')\n"
        "try:\n    resource.prlimit({sampler}, resource.RLIMIT_NOFILE, (10, 10))\n    print('FREE')\n"
        "except OSError: print('held')",
        ("exit",),
        said="held",
    ),
    "new namespaces": Attack(
        "import os, ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x10000000) == 0 or libc.unshare(0x20000) == 0: print('FREE')\n"
        "if libc.mount(b'x', b'/', b'tmpfs', 0, None) == 0 or libc.chroot(b'/') == 0: print('FREE')\n"
        "try:\n    os.setuid(0)\n    print('FREE' if {apart} else '')\nexcept OSError: pass\nprint('held')",
        ("exit",),
        said="held",
    ),
    "raised limits": Attack(
        "import resource\nfor kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):\n    try:\n"
        "        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n        print('FREE')\n"
        "    except (OSError, ValueError): pass\nprint('held')",
        ("exit",),
        said="held",
    ),
    "forged report": Attack(
        "import os\nfor n in range(3, 256):\n    try:\n        os.write(n, b'{{\"code\": 0}}\\n')\n        print('FREE', n)\n"
        "    except OSError: pass\nprint('held', flush=True)\nos._exit(7)",
        ("exit",),
        said="held",
    ),
    "crash": Attack("import ctypes\nctypes.string_at(0)", ("signal",)),
    "full scratch": Attack(
        "written = 0\ntry:\n    for i in range(10**6):\n        with open('/scratch/' + str(i), 'wb', buffering=0) as f:\n"
        "            written += f.write(bytes(1 << 16))\nexcept OSError: pass\n"
        "print('FREE' if written > 4 << 20 else 'held', written)",
        ("exit",),
        replace(LONG, scratch=4 << 20),
        said="held",
        needs=frozenset({"scratch"}),
    ),
    "too many files": Attack(
        "made = 0\ntry:\n    for i in range(10**5):\n        open('/scratch/' + str(i), 'w').close()\n        made += 1\n"
        "except OSError: pass\nprint('FREE' if made > 1000 else 'held')",
        ("exit",),
        replace(LONG, scratch=4 << 20),
        said="held",
        needs=frozenset({"scratch"}),
    ),
}

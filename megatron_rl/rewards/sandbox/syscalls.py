"""Which calls a program may make: a seccomp filter.

Refused are the calls by which a process reaches beyond its own memory and files: network, other processes, new namespaces,
mounts, kernel objects that no limit counts (shared memory, keys, io_uring), the clock and the machine, and whatever is newer
than the newest call that this list knew. What is left is what an interpreter computes and reads with.
"""

import errno
import os
import platform
import struct
from collections.abc import Iterator
from typing import NamedTuple

KNOWN = 450  # the newest call that was looked at; numbers above 423 are the same on every architecture
FOREIGN = 0x40000000  # x86-64: calls of its 32-bit-pointer variant begin here
NEW_NAMESPACES = 0x7E020080  # CLONE_NEW*, of clone's flags
CLONE_THREAD = 0x00010000

# On x86-64 and on arm64; None where the architecture does not have it.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
# Where no mount namespace hides the machine's files: what changes a file by its name and needs no right to open it.
NUMBERS_OF_FILES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "chown": (92, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "fremovexattr": (199, 16),
    "fsetxattr": (190, 7),
    "futimesat": (261, None),
    "lchown": (94, None),
    "lremovexattr": (198, 15),
    "lsetxattr": (189, 6),
    "removexattr": (197, 14),
    "setxattr": (188, 5),
    "truncate": (76, 45),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
}
# Where no process namespace hides the machine's processes: signals, but to oneself.
NUMBERS_OF_SIGNALS: dict[str, tuple[int | None, int | None]] = {
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tkill": (200, 130),
}


class Machine(NamedTuple):
    """What an architecture calls things."""

    column: int
    audit: int  # AUDIT_ARCH_*
    clone: int
    clone3: int
    forks: tuple[int, ...]
    kills: tuple[int, ...]  # kill and tgkill, whose first argument is a process
    prlimit: int
    socketpair: int


MACHINES = {
    "x86_64": Machine(0, 0xC000003E, 56, 435, (57, 58), (62, 234), 302, 53),
    "aarch64": Machine(1, 0xC00000B7, 220, 435, (), (129, 131), 261, 199),
}

AF_UNIX = 1
LOAD, EQUAL, ABOVE, BITS, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
CALL, ARCHITECTURE, ARGUMENT_0 = 0, 4, 16  # places in struct seccomp_data; an argument's low word comes first
ALLOW, KILL = 0x7FFF0000, 0x80000000


def filter_program(*, forks: bool, alone: bool) -> bytes:
    """The filter, as the kernel takes it, for the process that asks.

    forks: may it start processes? alone: can it see no process and no file of the machine (namespaces), so that signals and
    changes by name reach nothing but its own?
    """
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"no list of calls for the architecture {platform.machine()}")
    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, machine.audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, CALL),
        *_when(ABOVE, FOREIGN - 1, _refuse(errno.EPERM)),
        *_when(ABOVE, KNOWN, _refuse(errno.ENOSYS)),
    ]
    tables = (NUMBERS,) if alone else (NUMBERS, NUMBERS_OF_FILES, NUMBERS_OF_SIGNALS)
    for number in sorted(n for table in tables for pair in table.values() if (n := pair[machine.column]) is not None):
        code += _when(EQUAL, number, _refuse(errno.EPERM))
    for block in _looked_at(machine, forks=forks, alone=alone):
        code += block
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in code)


type _Line = tuple[int, int, int, int]


def _looked_at(machine: Machine, *, forks: bool, alone: bool) -> Iterator[list[_Line]]:
    """Calls that depend on their first argument. Each block either returns or leaves the number of the call loaded."""
    argument: _Line = (LOAD, 0, 0, ARGUMENT_0)
    yield _when(EQUAL, machine.clone3, _refuse(errno.ENOSYS))  # its flags lie in memory; libc then takes clone
    thread = [] if forks else [(BITS, 1, 0, CLONE_THREAD), *_refuse(errno.EAGAIN)]
    yield _when(
        EQUAL,
        machine.clone,
        [argument, (BITS, 0, 1, NEW_NAMESPACES), *_refuse(errno.EPERM), *thread, (RETURN, 0, 0, ALLOW)],
    )
    if not forks:
        for number in machine.forks:
            yield _when(EQUAL, number, _refuse(errno.EAGAIN))
    yield _when(EQUAL, machine.prlimit, _only(argument, 0))  # its own limits, which it can but lower
    yield _when(EQUAL, machine.socketpair, _only(argument, AF_UNIX))  # a pipe by another name; event loops have one
    if not alone:
        for number in machine.kills:
            yield _when(EQUAL, number, _only(argument, os.getpid()))


def _when(test: int, value: int, body: list[_Line]) -> list[_Line]:
    return [(test, 0, len(body), value), *body]


def _only(argument: _Line, value: int) -> list[_Line]:
    return [argument, (EQUAL, 1, 0, value), *_refuse(errno.EPERM), (RETURN, 0, 0, ALLOW)]


def _refuse(reason: int) -> list[_Line]:
    return [(RETURN, 0, 0, 0x00050000 | reason)]

"""Calls of the Linux kernel that Python's library does not have. Each raises OSError with the name of the call."""

import ctypes
import os
import struct
from collections.abc import Iterable

PDEATHSIG, DUMPABLE, DROP_FROM_BOUNDING_SET, NO_NEW_PRIVILEGES, SECCOMP = 1, 4, 24, 38, 22
SECCOMP_FILTER = 2
HIGHEST_CAPABILITY = 63

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME, MS_NODIRATIME = 1, 2, 4, 8, 32, 1024, 2048
MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 4096, 16384, 1 << 18, 1 << 21
MNT_DETACH = 2

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
RIGHTS_BY_VERSION = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # over files
NEWEST_RIGHTS = 0xFFFF
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0, more: int = 0) -> int:
    arguments = [ctypes.c_ulong(number) for number in (value, more, 0, 0)]
    return _checked(f"prctl {option}", _libc.prctl(option, *arguments))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() if text else None for text in (source, target, kind)]
    result = _libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None)
    _checked(f"mount {target}", result)


def unmount(target: str) -> None:
    _checked(f"umount {target}", _libc.umount2(target.encode(), MNT_DETACH))


def pivot_root(number: int, new: str, old: str) -> None:
    """`number` is the call's, which differs between architectures; libc has no function for it."""
    _checked("pivot_root", _libc.syscall(ctypes.c_long(number), new.encode(), old.encode()))


def drop_capabilities() -> None:
    """From here on no program that this process becomes has any capability, whatever its user."""
    for capability in range(HIGHEST_CAPABILITY + 1):
        try:
            prctl(DROP_FROM_BOUNDING_SET, capability)
        except (PermissionError, OSError):  # not ours to drop, so not ours to have; or above the kernel's last
            return


def install_filter(program: bytes) -> None:
    """Seccomp. Needs NO_NEW_PRIVILEGES."""
    filters = _Filter(len(program) // 8, program)
    result = _libc.prctl(SECCOMP, ctypes.c_ulong(SECCOMP_FILTER), ctypes.byref(filters), ctypes.c_ulong(0), ctypes.c_ulong(0))
    _checked("seccomp", result)


def landlock_version() -> int:
    """0: this kernel has none, or does not use it."""
    return max(0, _libc.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def confine_files(read: Iterable[str], write: Iterable[str]) -> None:
    """Landlock: files below `read` may be read and executed, below `write` anything; no others can be opened.

    Newer kernels also forbid TCP, signals to processes outside, and abstract sockets of others.
    """
    version = landlock_version()
    if version == 0:
        raise OSError(0, "landlock: this kernel has none, or does not use it")
    handled = RIGHTS_BY_VERSION.get(version, NEWEST_RIGHTS)
    words = [handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0]
    attributes = struct.pack("QQQ", *words)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    size = ctypes.c_size_t(len(attributes))
    rules = _checked("landlock", _libc.syscall(ctypes.c_long(LANDLOCK_CREATE), attributes, size, ctypes.c_uint(0)))
    for paths, rights in ((read, EXECUTE | READ_FILE | READ_DIR), (write, handled & ~EXECUTE)):
        for path in paths:
            _allow(rules, path, rights & handled)
    _checked("landlock", _libc.syscall(ctypes.c_long(LANDLOCK_RESTRICT), ctypes.c_int(rules), ctypes.c_uint(0)))
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= OF_A_FILE
        rule = struct.pack("=Qi", rights, place)
        call = ctypes.c_long(LANDLOCK_ADD)
        _checked("landlock", _libc.syscall(call, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0)))
    finally:
        os.close(place)

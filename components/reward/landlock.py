"""Landlock: a process gives up, for good, files and sockets it has no business with. Needs no privilege, so it holds in
an ordinary pod too. Interface: linux/landlock.h; ABI 4 added TCP, ABI 6 signals (Linux 6.7 and 6.12).
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH = 1
VERSION_FLAG = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE = 1 << 14
READ = EXECUTE | READ_FILE | READ_DIR
FILE_ONLY = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
BITS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
"""File access rights an ABI knows; from ABI 5 on there are 16."""
ABI_WITH_TCP, ABI_WITH_SCOPES = 4, 6
TCP_BIND_CONNECT = 0b11
SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Version of the kernel's Landlock; 0 where it has none or it is off."""
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION_FLAG)))


def restrict(readable: Iterable[Path], writable: Iterable[Path], *, network: bool) -> list[str]:
    """Limits this process and its children to these paths, and to no TCP unless `network`; says what it could not do.

    Must run while the process has one thread. Signals reach only processes that are restricted alike.
    """
    version = abi()
    if not version:
        return ["files: the kernel has no Landlock, so a function may read what this user may read"]
    everything = (1 << BITS_OF_ABI.get(version, 16)) - 1
    ruleset = _ruleset(version, everything, network)
    try:
        for path in readable:
            _allow(ruleset, path, READ)
        for path in writable:
            _allow(ruleset, path, everything)
        _check(libc.syscall(RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    finally:
        os.close(ruleset)
    return []


def _ruleset(version: int, files: int, network: bool) -> int:
    fields = [files]
    if version >= ABI_WITH_TCP:
        fields.append(0 if network else TCP_BIND_CONNECT)
    if version >= ABI_WITH_SCOPES:
        fields.append(SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    size = ctypes.c_size_t(len(attributes))
    return _check(libc.syscall(CREATE_RULESET, attributes, size, ctypes.c_uint32(0)), "landlock_create_ruleset")


def _allow(ruleset: int, path: Path, access: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # what is not there cannot be reached either
        return
    try:
        if not os.path.isdir(path):
            access &= FILE_ONLY
        rule = struct.pack("=Qi", access, handle)
        _check(libc.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, ctypes.c_uint32(0)), "landlock_add_rule")
    finally:
        os.close(handle)


def _check(result: int, call: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result

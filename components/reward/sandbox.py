"""What keeps a reward function in: no credentials, no network, bounded memory, nothing that outlives it.

Called by a worker as its first act, while it has one thread. Namespaces need a kernel and a pod that permit them,
Landlock a recent kernel; what cannot be had is reported and the pod's own policies stand alone there.
"""

import contextlib
import ctypes
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.reward import landlock

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_GET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 3, 38

SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc", "/opt", "/nix", "/proc", "/sys", "/dev")
CREDENTIAL_PATHS = ("/var/run/secrets", "/run/secrets")
WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""Environment variables a worker inherits; every other one may hold a credential."""

GIB = 1 << 30
MAX_FILE_BYTES = 256 << 20
MAX_OPEN_FILES = 1024
MAX_PROCESSES = 256
MAX_CPU_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Limits:
    """What a worker may use: `memory_gb` GiB of address space, the network or not, paths it may read."""

    scratch: str
    memory_gb: float
    network: bool
    readable: Sequence[str]


def readable_paths(extra: Sequence[str]) -> list[str]:
    """What workers may read: the system, Python with its packages, and `extra`; no folder that holds credentials."""
    found = [*SYSTEM_PATHS, sys.prefix, sys.base_prefix, *python_path(), *package_paths("components")]
    private = [Path.home(), *map(Path, CREDENTIAL_PATHS)]
    safe = [path for path in found if not any(place.is_relative_to(path) for place in private)]
    return [*safe, *(str(Path(path).resolve()) for path in extra)]


def package_paths(module: str) -> list[str]:
    """Where a module's top package lies, found without importing it; an editable install is not on the path."""
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):  # the worker will tell
        return []
    return list((spec and spec.submodule_search_locations) or [])


def python_path() -> list[str]:
    """Where this process finds modules, in absolute terms."""
    return [os.path.abspath(entry) for entry in sys.path]


def environment(scratch: Path) -> dict[str, str]:
    """Environment of a worker: where Python finds modules, a home of its own, one thread a library, and no more."""
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(python_path())}
    fixed = {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    return kept | one_thread | own | fixed


def confine(limits: Limits) -> list[str]:
    """Confines this process; gives what could not be had, a line each.

    Returns in a child process where process namespaces are permitted: whatever it starts dies with it.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    missing = _separate(limits.network)
    writable = [limits.scratch, *WRITABLE_DEVICES]
    try:
        missing += landlock.restrict(map(Path, limits.readable), map(Path, writable), network=limits.network)
    except OSError as error:
        missing.append(f"files: {error}")
    _limit(limits.memory_gb)
    return missing


def _separate(network: bool) -> list[str]:
    """Enters namespaces of its own: users (so that limits are its own), processes, IPC and, unless allowed, network."""
    wanted = CLONE_NEWPID | CLONE_NEWIPC | (0 if network else CLONE_NEWNET)
    user, group = os.getuid(), os.getgid()
    try:
        _unshare(CLONE_NEWUSER | wanted)
    except OSError:  # no user namespaces; root, or a pod that may, can still have the others
        try:
            _unshare(wanted)
        except OSError as error:
            return [_without_namespaces(network, error)]
    else:
        with contextlib.suppress(OSError):  # unmapped, it cannot create files: a function may not need any
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
    _continue_in_child()  # process 1 of the new namespace: when it ends the kernel ends all others in there
    _continue_in_child()  # process 2 works: signals have no default effect on process 1
    return []


def _without_namespaces(network: bool, error: OSError) -> str:
    open_ways = [] if network else ["UDP" if landlock.abi() >= landlock.ABI_WITH_TCP else "the network"]
    left = " and ".join([*open_ways, "processes left over"])
    return f"no namespaces here ({error.strerror}): {left} are up to the pod's own policies"


def _continue_in_child() -> None:
    """Goes on in a child; this process waits for it and ends as it does."""
    child = os.fork()
    if child:
        os.closerange(3, 256)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(memory_gb: float) -> None:
    limits: Mapping[int, int] = {
        resource.RLIMIT_AS: int(memory_gb * GIB),
        resource.RLIMIT_CPU: MAX_CPU_SECONDS,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for what, value in limits.items():
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _unshare(flags: int) -> None:
    if landlock.libc.unshare(ctypes.c_int(flags)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def prctl(option: int, value: int = 0) -> int:
    """Process control; see prctl(2)."""
    return landlock.libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(part) for part in (value, 0, 0, 0)))


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
    """While it lasts, workers of the same user cannot read this process's environment or memory from /proc."""
    before = prctl(PR_GET_DUMPABLE)
    prctl(PR_SET_DUMPABLE, 0)
    try:
        yield
    finally:
        prctl(PR_SET_DUMPABLE, before)

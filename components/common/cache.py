"""The node cache: blobs this machine has fetched before, shared by all pods on it, bounded, checked before every use.

    blake3/<hex>         whole blobs, read-only
    incoming/<hex>-*     blobs still on their way; an exclusive lock on the file says that its writer lives
    locks/<hex>          held while a blob is looked for or fetched: of many who want it, one fetches
    eviction             held while room is made

A fetched file is a hard link into the cache, or a symbolic link where it lies on another file system, or a copy for
who keeps it beyond this process. What is in use is never evicted: a hard link shows in the link count, a symbolic one
by a shared lock its process holds to its end. The kernel drops locks with their process, so a killed pod leaves nothing
locked.
"""

import errno
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.common.errors import DigestMismatch, SettingsError, StoreError
from components.common.integrity import blob_key
from components.common.manifest import file_digest
from components.common.store import disk_errors

FOLDER_VARIABLE = "GRPO_CACHE_DIR"
SIZE_VARIABLE = "GRPO_CACHE_GIB"
DEFAULT_GIB = 40.0
"""Fits the smallest cache volume the cluster settings ask for, 50 GiB, beside other caches on it."""

log = logging.getLogger("grpo")


@dataclass(frozen=True)
class Entry:
    """A blob in the cache."""

    path: Path
    size: int
    used: int
    """Time of its last use, in ns."""


def node_cache() -> "NodeCache | None":
    """The cache of this node: `$GRPO_CACHE_DIR` (`off`: none), else `grpo-pipeline/blobs` in the user's
    cache folder if that can be had.

    Raises:
        SettingsError: `$GRPO_CACHE_GIB` is no number.
        StoreError: `$GRPO_CACHE_DIR` cannot be written to.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named == "off":
        return None
    try:
        gib = float(os.environ.get(SIZE_VARIABLE) or DEFAULT_GIB)
    except ValueError:
        raise SettingsError(f"{SIZE_VARIABLE} wants a number, got {os.environ[SIZE_VARIABLE]!r}") from None
    if named:
        return NodeCache(Path(named), int(gib * 2**30))
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return NodeCache(caches / "grpo-pipeline" / "blobs", int(gib * 2**30))
    except (StoreError, RuntimeError) as error:  # a pod whose root is read-only, or a user without a home
        log.info("no node cache: %s", error)
        return None


class NodeCache:
    """A folder of blobs by digest, of at most `max_bytes`."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root.absolute(), max_bytes
        self._leases: dict[Path, int] = {}
        self._mutex = threading.Lock()
        for name in ("blake3", "incoming", "locks"):
            with disk_errors(f"make the cache {self.root / name} (set {FOLDER_VARIABLE} to another folder, or to off)"):
                (self.root / name).mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a blob lies, whether it is there or not."""
        return self.root / blob_key(digest).removeprefix("blobs/")

    def has(self, digest: str) -> bool:
        """Whether it is there; `get` checks it."""
        return self.path(digest).exists()

    def get(self, digest: str, size: int, make: Callable[[Path], None]) -> Path | None:
        """The blob, from the cache or else from `make(path)`, which checks what it writes; it stays until this process
        ends.

        None: it does not fit beside what is in use.
        """
        path = self.path(digest)
        with self._locked(self.root / "locks" / path.name):
            if not self._take(path, digest):
                if not self._bring(path, size, make):
                    return None
                if not self._take(path, None):  # evicted between these two lines
                    return None
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return path

    def place(self, digest: str, size: int, make: Callable[[Path], None], target: Path, *, own: bool = False) -> None:
        """Puts the blob at `target` without copying it, or with `own` as a copy that owes the cache nothing; past the
        cache when it does not fit there.

        Raises:
            DigestMismatch: the copy is not what was copied.
        """
        found = self.get(digest, size, make)
        if found is None:
            make(target)
            return
        with disk_errors(f"write {target}"):
            target.unlink(missing_ok=True)
            if own:
                shutil.copyfile(found, target)
                if (got := file_digest(target)) != digest:
                    raise DigestMismatch(f"{target}: the copy of {digest} has {got}; check this disk")
                return
            try:
                os.link(found, target)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                    raise
                target.symlink_to(found)

    def release(self) -> None:
        """Lets go of what this process uses."""
        with self._mutex:
            for handle in self._leases.values():
                os.close(handle)
            self._leases.clear()

    def entries(self) -> list[Entry]:
        """Blobs by time of use, oldest first."""
        found = []
        for path in (self.root / "blake3").iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # evicted meanwhile
                continue
            found.append(Entry(path, status.st_size, status.st_atime_ns))
        return sorted(found, key=lambda entry: entry.used)

    def _take(self, path: Path, digest: str | None) -> bool:
        """Leases a blob, then checks it: what is leased cannot be evicted meanwhile. No `digest`: it was checked as it
        was written, just now."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        fcntl.flock(handle, fcntl.LOCK_SH)
        good = os.fstat(handle).st_nlink > 0 and (digest is None or file_digest(path) == digest)
        if not good:
            if path.exists():
                log.warning("the cache held a changed %s; it is fetched again", path)
                path.unlink(missing_ok=True)
            os.close(handle)
            return False
        with self._mutex:
            before = self._leases.pop(path, None)
            self._leases[path] = handle
        if before is not None:
            os.close(before)
        return True

    def _bring(self, path: Path, size: int, make: Callable[[Path], None]) -> bool:
        temporary = self.root / "incoming" / f"{path.name}-{os.getpid()}-{threading.get_ident()}"
        handle = self._reserve(temporary, size)
        if handle is None:
            return False
        try:
            make(temporary)
            temporary.chmod(0o444)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)
        return True

    def _reserve(self, temporary: Path, size: int) -> int | None:
        """Makes room and takes it, so that others who make room see it taken; gives the locked file."""
        with self._locked(self.root / "eviction"):
            self._sweep()
            entries = self.entries()
            taken = sum(entry.size for entry in entries) + sum(_size(path) for path in self._incoming())
            for entry in entries:
                if taken + size <= self.max_bytes:
                    break
                if self._evict(entry.path):
                    taken -= entry.size
            if taken + size > self.max_bytes:
                return None
            with disk_errors(f"write {temporary}"):
                handle = os.open(temporary, os.O_CREAT | os.O_RDWR, 0o644)
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.truncate(handle, size)
        return handle

    def _evict(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_nlink != 1:
                    return False
                path.unlink()
        except (BlockingIOError, FileNotFoundError):  # in use, or gone
            return False
        (self.root / "locks" / path.name).unlink(missing_ok=True)
        return True

    def _incoming(self) -> list[Path]:
        return [path for path in (self.root / "incoming").iterdir() if path.is_file()]

    def _sweep(self) -> None:
        """Removes what writers left that died: their blobs at once, their folders of patches after a day."""
        for folder in (self.root / "incoming").glob(".patch-*"):
            try:
                old = time.time() - folder.stat().st_mtime > 86400
            except FileNotFoundError:  # its writer is done
                continue
            if old:
                shutil.rmtree(folder, ignore_errors=True)
        for path in self._incoming():
            try:
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            except (BlockingIOError, FileNotFoundError):  # its writer lives, or is done
                continue

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Holds a lock file; takes it anew when it was removed before the lock was got."""
        while True:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                same = os.fstat(handle).st_ino == path.stat().st_ino
            except FileNotFoundError:
                same = False
            if same:
                break
            os.close(handle)
        try:
            yield
        finally:
            os.close(handle)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

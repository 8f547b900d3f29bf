"""Object stores: where the bytes of artifacts live. One small Protocol; a folder is the embedded default."""

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from components.common.errors import ArtifactNotFound, DigestMismatch, SettingsError, StoreError
from components.common.integrity import BLOB


@dataclass(frozen=True)
class Stat:
    """What a store knows of an object: `size` in bytes, `modified` in UTC."""

    key: str
    size: int
    modified: datetime


class Store(Protocol):
    """Named, immutable-by-convention objects. An object is there whole or not at all."""

    url: str

    def put_file(self, path: Path, key: str) -> None:
        """Stores a file under `key`."""

    def get_file(self, key: str, path: Path) -> None:
        """Writes the object to `path`; what was there is lost, also when this fails. Raises ArtifactNotFound."""

    def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False, instead_of: bytes | None = None) -> bool:
        """Stores bytes; False says that nothing was written: with `if_absent` because the key was taken, with
        `instead_of` because the object no longer holds these bytes."""

    def get_bytes(self, key: str) -> bytes:
        """Raises ArtifactNotFound."""

    def stat(self, key: str) -> Stat | None:
        """None: no such object."""

    def list(self, prefix: str) -> Iterator[Stat]:
        """Objects whose key starts with `prefix`, in the order of their keys."""

    def touch(self, key: str) -> None:
        """Makes an object as young as one written now. Raises ArtifactNotFound."""

    def delete(self, key: str, *, before: datetime | None = None) -> bool:
        """Removes the object, with `before` only one that was written before then; False: there was none to remove."""


UNSAFE = re.compile(r"[\\\x00-\x1f\x7f]")
TEMPORARY = ".tmp-"
"""Start of the names of files that are still being written."""


def checked_key(key: str) -> str:
    """Refuses keys that could leave the store's root, or that a folder or a bucket cannot hold.

    Raises:
        StoreError: empty, absolute, with `.`, `..` or empty parts, backslashes or control characters, over 1,024 bytes,
            or the name of a temporary file.
    """
    parts = key.split("/")
    bad = any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in parts)
    if bad or UNSAFE.search(key) or len(key.encode(errors="replace")) > 1024:
        raise StoreError(f"not an object key: {key!r}")
    return key


def checked_prefix(prefix: str) -> str:
    """The same for the start of keys, which may be empty or end with a slash."""
    checked_key(prefix.rstrip("/") or "all")
    return prefix


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """An error of the local disk becomes one that says how to mend it."""
    try:
        yield
    except OSError as error:
        mends = {
            errno.ENOSPC: "; free space there or choose another place",
            errno.EDQUOT: "; the quota there is used up",
            errno.EACCES: "; give this user the right to",
            errno.EROFS: "; it is mounted read-only",
        }
        raise StoreError(f"cannot {what}: {error.strerror or error}{mends.get(error.errno or 0, '')}") from error


def open_store(url: str) -> Store:
    """Opens `file:///folder` or `s3://bucket/prefix?endpoint=...&region=...`.

    Raises:
        SettingsError: another scheme.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        from components.common.s3_store import S3Store

        return S3Store.from_url(url)
    raise SettingsError(f"store: want file:///folder or s3://bucket/prefix, got {url!r}")


class FileStore:
    """A folder as an object store: write to a temporary name, flush to disk, rename."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.url = self.root.as_uri()

    def path(self, key: str) -> Path:
        """File of an object, whether it is there or not."""
        return self.root / checked_key(key)

    def put_file(self, path: Path, key: str) -> None:
        with self._incoming(key) as temporary:
            shutil.copyfile(path, temporary)
            _flush(temporary)
            os.replace(temporary, self.path(key))
            _flush(temporary.parent)

    def get_file(self, key: str, path: Path) -> None:
        """Copies an object and checks it when its name says what it holds.

        Raises:
            ArtifactNotFound, DigestMismatch, StoreError
        """
        from components.common.manifest import file_digest

        with disk_errors(f"copy {self.url}/{key} to {path}"):
            try:
                shutil.copyfile(self.path(key), path)
            except (FileNotFoundError, NotADirectoryError):
                if self.stat(key):
                    raise
                raise ArtifactNotFound(f"{self.url}: no object {key}") from None
            named = BLOB.search(key)
            got = file_digest(path).removeprefix("blake3:") if named else ""
        if named and got != named.group(1):
            path.unlink()
            raise self._changed(key, got)

    def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False, instead_of: bytes | None = None) -> bool:
        with self._incoming(key) as temporary:
            temporary.write_bytes(data)
            _flush(temporary)
            if instead_of is not None:
                done = self._replace(temporary, key, instead_of)
            elif if_absent:
                done = self._link(temporary, key)
            else:
                os.replace(temporary, self.path(key))
                done = True
            _flush(temporary.parent)
            return done

    def _link(self, temporary: Path, key: str) -> bool:
        try:
            os.link(temporary, self.path(key))  # fails when the name is taken: one winner among racing writers
        except FileExistsError:
            return False
        return True

    def _replace(self, temporary: Path, key: str, before: bytes) -> bool:
        target = self.path(key)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed: no other writer between the look and the rename
            if not target.is_file() or target.read_bytes() != before:
                return False
            os.replace(temporary, target)
            return True
        finally:
            os.close(folder)

    def get_bytes(self, key: str) -> bytes:
        """Reads a whole object and checks it when its name says what it holds.

        Raises:
            ArtifactNotFound, DigestMismatch, StoreError
        """
        from blake3 import blake3

        with disk_errors(f"read {self.url}/{key}"):
            try:
                data = self.path(key).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise ArtifactNotFound(f"{self.url}: no object {key}") from None
        named = BLOB.search(key)
        if named and (got := blake3(data).hexdigest()) != named.group(1):
            raise self._changed(key, got)
        return data

    def _changed(self, key: str, got: str) -> DigestMismatch:
        return DigestMismatch(f"{self.url}: {key} was changed or cut: it holds {got}; delete it and make it again")

    def stat(self, key: str) -> Stat | None:
        with disk_errors(f"look up {self.url}/{key}"):
            try:
                found = self.path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return Stat(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def list(self, prefix: str) -> Iterator[Stat]:
        folder = self.root / checked_prefix(prefix).rpartition("/")[0]
        paths = (path for path in folder.rglob("*") if not path.name.startswith(TEMPORARY))
        for key in sorted(path.relative_to(self.root).as_posix() for path in paths):
            if key.startswith(prefix) and (found := self.stat(key)):
                yield found

    def touch(self, key: str) -> None:
        with disk_errors(f"touch {self.url}/{key}"):
            try:
                os.utime(self.path(key))
            except (FileNotFoundError, NotADirectoryError):
                raise ArtifactNotFound(f"{self.url}: no object {key}") from None

    def delete(self, key: str, *, before: datetime | None = None) -> bool:
        found = self.stat(key)
        if found is None or (before and found.modified >= before):
            return False
        with disk_errors(f"delete {self.url}/{key}"):
            self.path(key).unlink(missing_ok=True)
        return True

    def abandoned(self, before: datetime) -> Iterator[Path]:
        """Temporary files of writers that died before `before`."""
        for path in self.root.rglob(TEMPORARY + "*"):
            try:
                old = path.stat().st_mtime < before.timestamp()
            except FileNotFoundError:  # its writer is done
                continue
            if old:
                yield path

    @contextmanager
    def _incoming(self, key: str) -> Iterator[Path]:
        """A temporary file beside its target; gone afterwards whatever happens."""
        target = self.path(key)
        with disk_errors(f"write {target}"):
            _make_folder(target.parent)
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=target.parent)
            os.fchmod(handle, 0o644)
            os.close(handle)
            try:
                yield Path(name)
            finally:
                Path(name).unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that a reader finds as it was or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.replace(path)


def _make_folder(path: Path) -> None:
    """With those above it; their names are on the disk before anything lies in them."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _flush(path.parent)


def _flush(path: Path) -> None:
    """Brings a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

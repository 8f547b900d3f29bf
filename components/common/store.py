"""Object stores: where the bytes of artifacts live. One small Protocol; a folder is the embedded default."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from components.common.errors import ArtifactNotFound, SettingsError, StoreError


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
        """Writes the object to `path`. Raises ArtifactNotFound."""

    def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False) -> bool:
        """Stores bytes; with `if_absent`, False says the key was taken and nothing was written."""

    def get_bytes(self, key: str) -> bytes:
        """Raises ArtifactNotFound."""

    def stat(self, key: str) -> Stat | None:
        """None: no such object."""

    def list(self, prefix: str) -> Iterator[Stat]:
        """Objects whose key starts with `prefix`, in the order of their keys."""

    def delete(self, key: str) -> None:
        """Removes the object; one that is not there is no error."""


def checked_key(key: str) -> str:
    """Refuses keys that could leave the store's root.

    Raises:
        StoreError: empty, absolute, or with `.`/`..`/empty parts, backslashes or NUL.
    """
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or "\\" in key or "\0" in key:
        raise StoreError(f"not an object key: {key!r}")
    return key


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

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def put_file(self, path: Path, key: str) -> None:
        with self._incoming(key) as (temporary, target):
            shutil.copyfile(path, temporary)
            _flush(temporary)
            os.replace(temporary, target)

    def get_file(self, key: str, path: Path) -> None:
        try:
            shutil.copyfile(self._path(key), path)
        except FileNotFoundError:
            raise ArtifactNotFound(f"{self.url}: no object {key}") from None
        except OSError as error:
            raise StoreError(f"{self.url}: cannot copy {key} to {path}: {error.strerror}") from error

    def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False) -> bool:
        with self._incoming(key) as (temporary, target):
            temporary.write_bytes(data)
            _flush(temporary)
            if not if_absent:
                os.replace(temporary, target)
                return True
            try:
                os.link(temporary, target)  # fails when the name is taken: one winner among racing writers
            except FileExistsError:
                return False
            return True

    def get_bytes(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            raise ArtifactNotFound(f"{self.url}: no object {key}") from None
        except OSError as error:
            raise StoreError(f"{self.url}: cannot read {key}: {error.strerror}") from error

    def stat(self, key: str) -> Stat | None:
        try:
            found = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stat(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def list(self, prefix: str) -> Iterator[Stat]:
        folder = self.root / prefix.rpartition("/")[0]
        paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".tmp-"))
        for path in sorted(paths):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and (found := self.stat(key)):
                yield found

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _incoming(self, key: str) -> "_Incoming":
        return _Incoming(self._path(key))


class _Incoming:
    """A temporary file beside its target; gone afterwards whatever happens."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> tuple[Path, Path]:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".tmp-", dir=self.target.parent)
        except OSError as error:
            raise StoreError(f"cannot write to {self.target.parent}: {error.strerror}") from error
        os.close(handle)
        self.temporary = Path(name)
        return self.temporary, self.target

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"cannot write {self.target}: {error.strerror}"
            mend = "; free space there or choose another store" if error.errno == 28 else ""
            raise StoreError(reason + mend) from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

"""Manifests: the small JSON files that are our artifacts; the bytes they name live in the object store.

Written by every stage, read by the next, by `grpo artifacts` and by whoever rebuilds the history. A manifest is
written last, so an artifact is complete when its manifest exists.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from components.common.errors import ArtifactError, ArtifactNotFound
from components.common.integrity import blob_key
from components.common.settings import Settings

SCHEMA_VERSION = 1
SOURCE = (".py", ".html", ".css", ".js")
"""Files of this package that decide what a stage does."""
DIGEST_PATTERN = r"^blake3:[0-9a-f]{64}$"
BLOB_NAME = re.compile(r"blobs/blake3/[0-9a-f]{64}")

Kind = Literal["policy", "optimizer", "prompts", "rollout", "scored", "evaluation", "decision"]


class PatchStep(Settings):
    """One patch of a chain: an object that turns the file before it into the next."""

    key: str
    """Object that holds the patch."""
    size: int = Field(ge=0)
    """Bytes of the patch."""
    digest: str = Field(pattern=DIGEST_PATTERN)
    """BLAKE3 of the patch."""
    result: str = Field(pattern=DIGEST_PATTERN)
    """BLAKE3 of the file once it is applied."""
    changed: float = Field(ge=0, le=1)
    """Share of the file's values it changes."""


class Patch(Settings):
    """How a file is made that is not stored whole: from a full copy and patches in turn."""

    base: str = Field(pattern=DIGEST_PATTERN)
    """BLAKE3 of the full copy."""
    base_size: int = Field(ge=0)
    """Bytes of the full copy."""
    steps: tuple[PatchStep, ...] = Field(min_length=1)
    """Patches, in the order they apply."""


class File(Settings):
    """One file of an artifact."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")
    """Relative path inside the artifact; no part starts with a dot."""
    size: int = Field(ge=0)
    """Bytes."""
    digest: str = Field(pattern=DIGEST_PATTERN)
    """BLAKE3 of the content."""
    key: str
    """Object that holds the bytes; with a patch, the full copy the patches start from."""
    patch: Patch | None = None
    """Patches that turn that object into this file; none: the object is the file."""

    @model_validator(mode="after")
    def _check_keys(self) -> "File":
        """An object's key follows from its content: nothing else a manifest says is ever used as a path."""
        whole = self.patch.base if self.patch else self.digest
        steps = self.patch.steps if self.patch else ()
        if self.key != blob_key(whole) or any(step.key != blob_key(step.digest) for step in steps):
            raise ValueError(f"{self.name}: a key is not that of its digest")
        if steps and steps[-1].result != self.digest:
            raise ValueError(f"{self.name}: the last patch makes another file")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Every object that is needed to have the file."""
        return (self.key, *(step.key for step in self.patch.steps)) if self.patch else (self.key,)


class Producer(Settings):
    """Who made the artifact."""

    stage: str
    """Name of the stage."""
    key: str
    """Digest of everything the stage's result depends on; the same key never runs twice."""
    settings_digest: str
    """Digest of the stage's settings."""
    code_version: str
    """Digest of the stage's source."""


class Manifest(Settings):
    """An artifact: what it is, which files it has, what it derives from."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    """What the files are."""
    digest: str
    """Of kind, names, sizes and digests: the same content has the same digest wherever and whenever it was made."""
    files: tuple[File, ...] = ()
    parents: dict[str, str] = {}
    """Role in the producing stage → digest of the artifact it read."""
    producer: Producer
    fine_tune: str
    run: str
    iteration: int | None = None
    """Updates the policy this artifact concerns has had; none for what belongs to the whole run."""
    created: datetime
    metrics: dict[str, float] = {}
    metadata: dict[str, Any] = {}
    store: str
    """URL of the store that holds the blobs."""

    @model_validator(mode="after")
    def _check_names(self) -> "Manifest":
        """Two files of one name would be one file when they are fetched."""
        if len(self.names) < len(self.files):
            raise ValueError("two files have the same name")
        return self

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def names(self) -> set[str]:
        """Names of the files."""
        return {file.name for file in self.files}

    @property
    def blobs(self) -> set[str]:
        """Keys of the blobs it speaks of anywhere: of its files, of their patches, and in its metadata."""
        return set(BLOB_NAME.findall(self.dump().decode()))

    def dump(self) -> bytes:
        """As JSON, readable by people too."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> "Manifest":
        """Reads a manifest and checks that its digest is that of its own entries.

        Raises:
            ArtifactError: not a manifest, of another schema version, or altered.
        """
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(
                f"{where} is not a manifest of schema {SCHEMA_VERSION}: {place}: {first['msg']}"
            ) from None
        if manifest.digest != content_digest(manifest.kind, manifest.files):
            raise ArtifactError(f"{where}: the manifest was altered: its digest is not that of its entries")
        return manifest

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Reads a manifest file. Raises ArtifactNotFound, ArtifactError."""
        try:
            return cls.parse(Path(path).read_bytes(), where=str(path))
        except FileNotFoundError:
            raise ArtifactNotFound(f"no manifest at {path}; did the stage before finish?") from None


def content_digest(kind: str, files: Iterable[File]) -> str:
    """Digest of an artifact: over its kind and the name, size and digest of each file, in the order of the names."""
    from blake3 import blake3

    entries = sorted((file.name, file.size, file.digest) for file in files)
    return "blake3:" + blake3(json.dumps([kind, entries], separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE3 of a file, read once, on all cores when it is large."""
    from blake3 import blake3

    if path.stat().st_size < 8 << 20:  # one thread: the thread pool would not survive a fork
        return "blake3:" + blake3(path.read_bytes()).hexdigest()
    return "blake3:" + blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def text_digest(text: str) -> str:
    """Short digest of a text, for settings and keys."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@cache
def code_version(stage: str) -> str:
    """Digest of a stage's source, its own folder and `common`: the same wherever the same code is installed."""
    root = Path(__file__).parents[1]
    paths = sorted(path for folder in ("common", stage) for path in (root / folder).rglob("*") if path.suffix in SOURCE)
    whole = hashlib.sha256()
    for path in paths:
        data = path.read_bytes()
        whole.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return f"sha256:{whole.hexdigest()[:16]}"


SCORED_BEFORE = "scored_before"
"""Entry of a policy's metadata: the scored rollouts before it, in whatever run; configure writes, rollout reads it."""


def manifest_key(fine_tune: str, run: str, iteration: int | None, name: str) -> str:
    """Where a manifest lives in the store."""
    return f"manifests/{fine_tune}/{run}/{'run' if iteration is None else f'{iteration:04d}'}/{name}.json"


def now() -> datetime:
    """The present, in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)

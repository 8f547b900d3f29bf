"""Publishing and fetching artifacts: blobs by content, manifest last, every byte checked on the way back."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.common.errors import AlreadyPublished, DigestMismatch
from components.common.manifest import File, Kind, Manifest, Producer, content_digest, file_digest, manifest_key, now
from components.common.settings import RunContext
from components.common.store import Store


def upload(store: Store, files: Mapping[str, Path]) -> list[File]:
    """Uploads files as blobs named by their content; a blob that is there already is not sent again."""
    return [_upload(store, name, path) for name, path in sorted(files.items())]


def _upload(store: Store, name: str, path: Path) -> File:
    digest = file_digest(path)
    algorithm, _, value = digest.partition(":")
    file = File(name=name, size=path.stat().st_size, digest=digest, key=f"blobs/{algorithm}/{value}")
    present = store.stat(file.key)
    if present is None or present.size != file.size:
        store.put_file(path, file.key)
    return file


def publish(
    store: Store,
    context: RunContext,
    *,
    name: str,
    kind: Kind,
    files: Mapping[str, Path],
    producer: Producer,
    reuse: Sequence[File] = (),
    parents: Mapping[str, str] | None = None,
    iteration: int | None = None,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """Uploads `files`, then writes the manifest under its name in the store, if that name is free.

    `reuse` are files of other artifacts of the same store: they become part of this one and no byte moves.

    Raises:
        AlreadyPublished: the name holds an artifact that another key produced.
        StoreError: the store refused; nothing is visible then.
    """
    entries = tuple(sorted([*upload(store, files), *reuse], key=lambda file: file.name))
    manifest = Manifest(
        kind=kind, digest=content_digest(kind, entries), files=entries, parents=dict(parents or {}), producer=producer,
        fine_tune=context.fine_tune, run=context.run, iteration=iteration, created=now(),
        metrics=dict(metrics or {}), metadata=dict(metadata or {}), store=store.url,
    )  # fmt: skip
    key = manifest_key(context.fine_tune, context.run, iteration, name)
    if store.put_bytes(manifest.dump(), key, if_absent=True):
        return manifest
    present = Manifest.parse(store.get_bytes(key), where=key)
    if present.producer.key != producer.key:
        raise AlreadyPublished(
            f"{key} was already made with other settings or inputs; start another run, or delete that manifest"
        )
    return present


def fetch(store: Store, manifest: Manifest, directory: Path, names: Collection[str] | None = None) -> Path:
    """Brings an artifact's files (or only `names`) into `directory` and checks each against its digest.

    Raises:
        ArtifactNotFound: a blob is gone.
        DigestMismatch: a blob was changed or cut; the file is not left behind.
    """
    for file in manifest.files:
        if names is None or file.name in names:
            _download(store, file, directory / file.name)
    return directory


def _download(store: Store, file: File, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        store.get_file(file.key, temporary)
        if (got := file_digest(temporary)) != file.digest:
            raise DigestMismatch(
                f"{file.name}: {store.url}/{file.key} was changed or cut: want {file.digest}, got {got}; "
                "delete that object and run the stage that made it again"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)

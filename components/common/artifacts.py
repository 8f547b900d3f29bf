"""Publishing and fetching artifacts: blobs by content, manifest last, every byte checked on the way back."""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from components.common.cache import NodeCache, node_cache
from components.common.errors import AlreadyPublished, ArtifactNotFound
from components.common.integrity import blob_key
from components.common.manifest import File, Kind, Manifest, Producer, content_digest, file_digest, manifest_key, now
from components.common.patched import REFRESH_AFTER, materialise, put_blob
from components.common.scheduling import in_parallel
from components.common.settings import RunContext
from components.common.store import FileStore, Store, disk_errors

FILES_AT_ONCE = 4
"""Files of an artifact under way at once; each large one travels in parallel parts of its own."""


def upload(store: Store, files: Mapping[str, Path]) -> list[File]:
    """Uploads files as blobs named by their content; a blob that is there already is not sent again."""
    return in_parallel(FILES_AT_ONCE, partial(_upload, store), sorted(files.items()))


def _upload(store: Store, item: tuple[str, Path]) -> File:
    name, path = item
    digest = file_digest(path)
    file = File(name=name, size=path.stat().st_size, digest=digest, key=blob_key(digest))
    put_blob(store, path, file.key)
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
        ArtifactNotFound: a blob of `reuse` is gone.
        StoreError: the store refused; nothing is visible then.
    """
    entries = tuple(sorted([*upload(store, files), *reuse], key=lambda file: file.name))
    manifest = Manifest(
        kind=kind, digest=content_digest(kind, entries), files=entries, parents=dict(parents or {}), producer=producer,
        fine_tune=context.fine_tune, run=context.run, iteration=iteration, created=now(),
        metrics=dict(metrics or {}), metadata=dict(metadata or {}), store=store.url,
    )  # fmt: skip
    _look(store, manifest)
    key = manifest_key(context.fine_tune, context.run, iteration, name)
    if store.put_bytes(manifest.dump(), key, if_absent=True):
        try:
            _look(store, manifest)
        except ArtifactNotFound:  # a collector that had looked before the blob was made young
            store.delete(key)
            raise
        return manifest
    present = Manifest.parse(store.get_bytes(key), where=key)
    if present.producer.key != producer.key:
        raise AlreadyPublished(
            f"{key} was already made with other settings or inputs; start another run, or delete that manifest"
        )
    return present


def _look(store: Store, manifest: Manifest) -> None:
    """Whether the blobs of a manifest's files are there. Old ones become young, also those its metadata speaks of, so
    that no collector is about to take them.

    Raises:
        ArtifactNotFound: one is gone.
    """
    promised = {key for file in manifest.files for key in file.keys}

    def look(key: str) -> None:
        found = store.stat(key)
        if found is None and key in promised:
            raise ArtifactNotFound(
                f"{store.url}: {key} is gone, collected or deleted; run the stage that made it again"
            )
        if found and now() - found.modified > REFRESH_AFTER:
            store.touch(key)

    in_parallel(FILES_AT_ONCE, look, sorted(manifest.blobs))


def fetch(
    store: Store,
    manifest: Manifest,
    directory: Path,
    names: Collection[str] | None = None,
    *,
    own: bool = False,
    cache: NodeCache | None = None,
) -> Path:
    """Brings an artifact's files (or only `names`) into `directory` and checks each against its digest.

    From a remote store they come through the node's cache, as read-only links into it that are good while this process
    lives; what this node fetched before, or the full copy a patched file starts from, is not sent again. With `own`
    they are copies, for whoever keeps them.

    Raises:
        ArtifactNotFound: a blob is gone.
        DigestMismatch: a blob was changed or cut; the file is not left behind.
    """
    if cache is None and not isinstance(store, FileStore):
        cache = node_cache()
    wanted = [file for file in manifest.files if names is None or file.name in names]
    in_parallel(FILES_AT_ONCE, lambda file: _bring(store, file, directory / file.name, cache, own), wanted)
    return directory


def _bring(store: Store, file: File, target: Path, cache: NodeCache | None, own: bool) -> None:
    with disk_errors(f"write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        temporary.unlink(missing_ok=True)
    try:
        if cache:
            cache.place(file.digest, file.size, lambda path: materialise(store, file, path, cache), temporary, own=own)
        else:
            materialise(store, file, temporary, None)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)

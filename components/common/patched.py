"""Policies stored as patches: what is uploaded instead of a full copy, and how the file is made again from it."""

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from pydantic import Field

from components.common import delta
from components.common.cache import NodeCache
from components.common.integrity import blob_key
from components.common.manifest import File, Manifest, Patch, PatchStep, file_digest, now
from components.common.scheduling import in_parallel
from components.common.settings import Settings
from components.common.store import FileStore, Store, disk_errors

SMALLEST = 64 << 10
"""Bytes below which a file is always stored whole."""
REFRESH_AFTER = timedelta(hours=12)
"""Age at which a blob that is published again is made young, so that a garbage collection, which spares what is younger
than its grace period (a day at least), cannot take it before the manifest is there."""


class DeltaSettings(Settings):
    """When a policy is stored as a lossless patch of the one before instead of a full copy."""

    enabled: bool = True
    """Store patches at all."""
    max_share: float = Field(default=0.5, gt=0, le=1)
    """Bytes of the patches since the last full copy, together, as a share of a full copy; beyond it a full one is
    stored, so that no reader fetches more than 1 + max_share copies."""
    max_chain: int = Field(default=16, ge=1, le=1000)
    """Patches in a row after which a full copy is stored."""


def put_blob(store: Store, path: Path, key: str) -> None:
    """Stores a blob unless a young one is there."""
    present = store.stat(key)
    if present is None or present.size != path.stat().st_size or now() - present.modified > REFRESH_AFTER:
        store.put_file(path, key)


# --- publishing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Uploaded:
    """A weight file in the store, and what it took."""

    file: File
    stored: int
    """Bytes it added: of the patch, of the full copy, or none."""
    report: delta.Report | None = None


def upload_policy(
    store: Store, files: Mapping[str, Path], base: Manifest, base_dir: Path, settings: DeltaSettings
) -> tuple[list[File], dict[str, float]]:
    """Uploads a policy's weight files, as patches of the `base` policy's where that pays, and tells what it took.

    `base_dir` holds the base's files as they were fetched; one that is missing or was changed since is no base.
    """
    started = time.monotonic()
    before = {file.name: file for file in base.files} if settings.enabled and base.store == store.url else {}

    def work(item: tuple[str, Path]) -> _Uploaded:
        name, path = item
        return _upload(store, name, path, before.get(name), base_dir / name, settings)

    uploaded = in_parallel(2, work, sorted(files.items()))  # one is encoded while another is sent
    stored = sum(one.stored for one in uploaded)
    metrics = {
        "artifact/policy_bytes": float(stored),
        "artifact/delta_ratio": sum(one.file.size for one in uploaded) / max(stored, 1),
        "artifact/publish_seconds": time.monotonic() - started,
    }
    reports = [one.report for one in uploaded if one.report]
    if reports:
        metrics["artifact/changed_fraction"] = sum(r.changed for r in reports) / max(
            1, sum(r.elements for r in reports)
        )
    return [one.file for one in uploaded], metrics


def _upload(
    store: Store, name: str, path: Path, base: File | None, base_path: Path, settings: DeltaSettings
) -> _Uploaded:
    digest, size = file_digest(path), path.stat().st_size
    if base and base.digest == digest:
        same = delta.Report(delta.count_values(path), changed=0, size=0) if name.endswith(".safetensors") else None
        return _Uploaded(base, 0, same)
    if base and size >= SMALLEST and name.endswith(".safetensors"):
        with (
            disk_errors(f"write a patch of {path}"),
            tempfile.TemporaryDirectory(prefix=".patch-", dir=path.parent) as folder,
        ):
            patch = Path(folder) / "patch"
            report = _encode(base, base_path, path, digest, patch, settings)
            if report:
                step = PatchStep(
                    key=blob_key(file_digest(patch)), size=report.size, digest=file_digest(patch), result=digest,
                    changed=report.changed / max(1, report.elements),
                )  # fmt: skip
                put_blob(store, patch, step.key)
                start = base.patch or Patch.model_construct(base=base.digest, base_size=base.size, steps=())
                chain = Patch(base=start.base, base_size=start.base_size, steps=(*start.steps, step))
                return _Uploaded(
                    File(name=name, size=size, digest=digest, key=base.key, patch=chain), step.size, report
                )
    put_blob(store, path, blob_key(digest))
    return _Uploaded(File(name=name, size=size, digest=digest, key=blob_key(digest)), size)


def _encode(
    base: File, base_path: Path, path: Path, digest: str, patch: Path, settings: DeltaSettings
) -> delta.Report | None:
    """None: no patch, since it would be too large, the chain too long, or the base is not at hand as it was."""
    steps = base.patch.steps if base.patch else ()
    room = int(settings.max_share * path.stat().st_size) - sum(step.size for step in steps)
    if len(steps) >= settings.max_chain or room <= 0:
        return None
    if not base_path.exists() or file_digest(base_path) != base.digest:
        return None
    return delta.encode(base_path, path, patch, base_digest=base.digest, new_digest=digest, limit=room)


# --- fetching -------------------------------------------------------------------------------------------------------


def materialise(store: Store, file: File, path: Path, cache: NodeCache | None) -> None:
    """Writes a file from its object, or from the newest of its versions at hand and the patches since; checks that it
    has the file's digest."""
    if file.patch is None:
        store.get_file(file.key, path)
        return
    base, steps = _nearest(file, cache)
    with disk_errors(f"write {path}"):
        folder = Path(tempfile.mkdtemp(prefix=".patch-", dir=path.parent))
    try:
        patches = [folder / str(number) for number in range(len(steps))]
        in_parallel(4, lambda pair: store.get_file(pair[0].key, pair[1]), list(zip(steps, patches, strict=True)))
        start = _base(store, base, folder, cache)
        with disk_errors(f"write {path}"):
            delta.decode(start, patches, path, base_digest=base.digest, new_digest=file.digest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _nearest(file: File, cache: NodeCache | None) -> tuple[File, tuple[PatchStep, ...]]:
    """The version of the file to start from, and the patches from there on."""
    assert file.patch
    steps = file.patch.steps
    for position in range(len(steps) - 2, -1, -1):
        if cache and cache.has(steps[position].result):
            chain = file.patch.model_copy(update={"steps": steps[: position + 1]})
            return file.model_copy(update={"digest": steps[position].result, "patch": chain}), steps[position + 1 :]
    whole = {"digest": file.patch.base, "size": file.patch.base_size, "patch": None}
    return file.model_copy(update=whole), steps


def _base(store: Store, base: File, folder: Path, cache: NodeCache | None) -> Path:
    found = cache.get(base.digest, base.size, lambda path: materialise(store, base, path, cache)) if cache else None
    if found:
        return found
    if isinstance(store, FileStore) and base.patch is None and store.stat(base.key):
        return store.path(base.key)  # no copy: the result's digest proves the base
    materialise(store, base, folder / "base", cache)
    return folder / "base"

"""An accepted policy as a plain Hugging Face folder, for those who want files and no store."""

import logging
import shutil
from pathlib import Path

from components.common.artifacts import fetch
from components.common.manifest import Manifest
from components.common.store import open_store
from components.publish.config import EXPORT_MARK

log = logging.getLogger("grpo")


def export(policy: Manifest, export_dir: str | None) -> None:
    """Puts the policy beside the folder, then swaps them, so that a reader never sees half a model."""
    if export_dir is None:
        return
    folder = Path(export_dir).absolute()
    fresh, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    fetch(open_store(policy.store), policy, fresh, own=True)
    (fresh / EXPORT_MARK).write_bytes(policy.dump())
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    log.info("exported to %s", folder)

"""An accepted policy as a plain Hugging Face folder, for those who want files and no store."""

import ctypes
import logging
import os
import shutil
from pathlib import Path

from components.common.artifacts import fetch
from components.common.manifest import Manifest
from components.common.store import open_store
from components.publish.config import EXPORT_MARK

log = logging.getLogger("grpo")

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def export(policy: Manifest, export_dir: str | None) -> None:
    """Puts the policy beside the folder, then swaps them, so that a reader sees the old model or the new one, whole.

    Where the file system cannot swap (NFS), there is neither for an instant.
    """
    if export_dir is None:
        return
    folder = Path(export_dir).absolute()
    fresh, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    fetch(open_store(policy.store), policy, fresh, own=True)
    (fresh / EXPORT_MARK).write_bytes(policy.dump())
    if not folder.exists():
        fresh.rename(folder)
    elif not _swap(fresh, folder):
        folder.rename(old)
        fresh.rename(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    log.info("exported to %s", folder)


def _swap(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False: the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (os.fsencode(one), os.fsencode(other))
    return bool(renameat2) and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0

"""An accepted policy as a plain Hugging Face folder, for those who want files and no store."""

import logging
import shutil
from pathlib import Path

from components.common.artifacts import fetch
from components.common.errors import SettingsError
from components.common.manifest import Manifest
from components.common.store import open_store

log = logging.getLogger("grpo")

MARK = "grpo-policy.json"
"""File of an exported policy that says which one it is."""


def check(export_dir: str | None) -> None:
    """Refuses to replace a folder that is not an earlier export.

    Raises:
        SettingsError: the folder holds something else.
    """
    if export_dir is None:
        return
    folder = Path(export_dir)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).exists())):
        raise SettingsError(
            f"publish.export_dir = {export_dir!r} exists and is no earlier export (no {MARK} in it); "
            "name a new or empty folder"
        )


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
    (fresh / MARK).write_bytes(policy.dump())
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    log.info("exported to %s", folder)

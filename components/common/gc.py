"""Garbage collection: marks the blobs that live artifacts need, sweeps the others once they are old enough.

Manifests are never deleted: a few KB each, they are the history. What an old one promises may be gone; the stage that
made it makes it again when a rerun needs it.

Safe beside a run that publishes: blobs are listed before manifests are read, so a blob written later is no candidate;
what is younger than the grace period stays; whoever publishes a blob that is there already, and older than half a day,
writes it again, which makes it young, and looks once more for all its blobs before the manifest promises them; and a
blob is looked at again right before it is deleted.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from components.common.errors import ArtifactError, SettingsError
from components.common.lineage import PREFIX, Recorded, history
from components.common.manifest import now
from components.common.scheduling import in_parallel
from components.common.store import FileStore, Stat, Store

GRACE = timedelta(hours=24)
LASTING = {"prompts", "evaluation", "decision"}
"""Kinds that are small and tell the history; always live."""
SWEPT = ("blobs/", "partial/")
"""What is swept: blobs, and what interrupted rollouts saved and none came back for."""
BLOB_NAME = re.compile(r"blobs/blake3/[0-9a-f]{64}")
REFERENCE = "reference"
"""Role and name of the policy a fine-tune started from."""
DELETERS = 16


@dataclass
class Plan:
    """What a collection would do."""

    live: set[str] = field(default_factory=set)
    """Names of the artifacts that are kept."""
    live_bytes: int = 0
    sweep: list[Stat] = field(default_factory=list)
    """Blobs that nothing live needs, older than the grace period."""
    young: list[Stat] = field(default_factory=list)
    """Blobs that nothing live needs yet; a run may be about to."""

    @property
    def bytes(self) -> int:
        """Bytes the sweep frees."""
        return sum(stat.size for stat in self.sweep)


def plan(store: Store, *, keep_last: int, keep_champions: bool = True, grace: timedelta = GRACE) -> Plan:
    """Marks and lists; changes nothing.

    `keep_last`: iterations of each fine-tune, counted over its runs from the newest, whose policies, optimizer states
    and rollouts stay.

    Raises:
        SettingsError: `keep_last` below 1.
        ArtifactError: a manifest or pointer cannot be read, so that nobody knows what it needs.
    """
    if keep_last < 1:
        raise SettingsError(f"keep_last must be at least 1, got {keep_last}: a fine-tune could not go on")
    blobs = [stat for prefix in SWEPT for stat in store.list(prefix)]
    records = history(store)
    live = _live(records, keep_last)
    if keep_champions:
        live |= _champions(store)
    needed = {key for record in records if record.key in live for key in _needs(record)}
    cutoff = now() - grace
    result = Plan(live={record.name for record in records if record.key in live})
    for blob in blobs:
        if blob.key in needed:
            result.live_bytes += blob.size
        else:
            (result.sweep if blob.modified < cutoff else result.young).append(blob)
    return result


def sweep(store: Store, found: Plan, *, grace: timedelta = GRACE) -> int:
    """Deletes what a plan found, and what died while being written; gives the bytes of the blobs deleted."""
    cutoff = now() - grace

    def remove(blob: Stat) -> int:
        present = store.stat(blob.key)
        if present is None or present.modified >= cutoff:  # written again since: someone is about to need it
            return 0
        store.delete(blob.key)
        return present.size

    freed = sum(in_parallel(DELETERS, remove, found.sweep))
    if isinstance(store, FileStore):
        for path in store.abandoned(cutoff):
            path.unlink(missing_ok=True)
    elif hasattr(store, "unfinished"):
        for upload in list(store.unfinished()):
            if upload["Initiated"] < cutoff:
                store.abort(upload)  # type: ignore[attr-defined]
    return freed


def _live(records: Sequence[Recorded], keep_last: int) -> set[str]:
    live = {record.key for record in records if record.manifest.kind in LASTING or record.manifest.iteration is None}
    rounds: dict[str, dict[tuple[str, int], Any]] = {}
    for record in records:
        manifest = record.manifest
        if manifest.iteration is not None:
            newest = rounds.setdefault(manifest.fine_tune, {})
            where = manifest.run, manifest.iteration
            newest[where] = max(record.moment, newest.get(where, record.moment))
    kept = {
        (fine_tune, *where)
        for fine_tune, newest in rounds.items()
        for where in sorted(newest, key=lambda place, newest=newest: newest[place])[-keep_last:]
    }
    for record in records:
        manifest = record.manifest
        if (manifest.fine_tune, manifest.run, manifest.iteration) in kept:
            live.add(record.key)
    return live | _references(records, live)


def _references(records: Sequence[Recorded], live: set[str]) -> set[str]:
    """Reference policies of what is kept: a run that goes on measures its distance from them."""
    wanted = {
        digest
        for record in records
        if record.key in live
        for role, digest in record.manifest.parents.items()
        if role == REFERENCE
    }
    runs = {(record.manifest.fine_tune, record.manifest.run) for record in records if record.key in live}
    return {
        record.key
        for record in records
        if record.manifest.digest in wanted
        or (record.name.endswith(f"/{REFERENCE}") and (record.manifest.fine_tune, record.manifest.run) in runs)
    }


def _champions(store: Store) -> set[str]:
    """Manifests that pointers name: the champions, and the evaluations that spoke for them."""
    found = set()
    for stat in store.list("pointers/"):
        try:
            pointer = json.loads(store.get_bytes(stat.key))
        except ValueError as error:
            raise ArtifactError(f"{stat.key} is not a pointer ({error}); restore or delete it, then collect") from None
        found |= {value for value in pointer.values() if isinstance(value, str) and value.startswith(PREFIX)}
    return found


def _needs(record: Recorded) -> set[str]:
    """Blobs a manifest speaks of anywhere: its files, their patches, and what its metadata carries."""
    return set(BLOB_NAME.findall(record.manifest.dump().decode()))

"""Garbage collection: marks the blobs that live artifacts need, sweeps the others once they are old enough.

Manifests are never deleted: a few KB each, they are the history. What an old one promises may be gone; the stage that
made it makes it again when a rerun needs it.

Safe beside a run that publishes: blobs are listed before manifests are read, so a blob written later is no candidate;
what is younger than the grace period stays; a publisher makes every blob young that its manifest is going to name and
that is older than half a day; manifests that came after the plan are read before the sweep; a blob's age is looked at
again at each attempt to delete it; and the publisher looks for its blobs before and after it writes the manifest, which
it takes back when one is gone.
"""

import json
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
COUNTED = {"policy", "optimizer"}
"""Kinds that make an iteration count among the last ones."""
SWEPT = ("blobs/", "partial/", "parts/")
"""What is swept: blobs, and what interrupted rollouts and updates left and none came back for."""
TASK = "/task.json"
"""What an update of several nodes reads when it starts; a queue may hold it back for longer than any grace period."""
REFERENCE = "reference"
"""Role and name of the policy a fine-tune started from."""
DELETERS = 16


@dataclass
class Plan:
    """What a collection would do."""

    known: set[str] = field(default_factory=set)
    """Keys of the manifests it was made from."""
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
    blobs = [stat for prefix in SWEPT for stat in store.list(prefix) if not stat.key.endswith(TASK)]
    records = history(store)
    live = kept(store, records, keep_last=keep_last, keep_champions=keep_champions)
    needed = {key for record in records if record.key in live for key in record.manifest.blobs}
    cutoff = now() - grace
    names = {record.name for record in records if record.key in live}
    result = Plan(known={record.key for record in records}, live=names)
    for blob in blobs:
        if blob.key in needed:
            result.live_bytes += blob.size
        else:
            (result.sweep if blob.modified < cutoff else result.young).append(blob)
    return result


def sweep(store: Store, found: Plan, *, grace: timedelta = GRACE) -> int:
    """Deletes what a plan found, and what died while being written; gives the bytes of the blobs deleted."""
    cutoff = now() - grace
    needed = {key for record in history(store, but=found.known) for key in record.manifest.blobs}

    def remove(blob: Stat) -> int:
        return blob.size if blob.key not in needed and store.delete(blob.key, before=cutoff) else 0

    freed = sum(in_parallel(DELETERS, remove, found.sweep))
    if isinstance(store, FileStore):
        for path in store.abandoned(cutoff):
            path.unlink(missing_ok=True)
    elif hasattr(store, "unfinished"):
        for upload in list(store.unfinished()):
            if upload["Initiated"] < cutoff:
                store.abort(upload)  # type: ignore[attr-defined]
    return freed


def kept(store: Store, records: Sequence[Recorded], *, keep_last: int, keep_champions: bool = True) -> set[str]:
    """Keys of the manifests whose blobs stay.

    Raises:
        SettingsError: `keep_last` below 1.
        ArtifactError: a pointer cannot be read.
    """
    if keep_last < 1:
        raise SettingsError(f"keep_last must be at least 1, got {keep_last}: a fine-tune could not go on")
    live = {record.key for record in records if record.manifest.kind in LASTING or record.manifest.iteration is None}
    newest = _newest(records, keep_last)
    for record in records:
        manifest = record.manifest
        if (manifest.fine_tune, manifest.run, manifest.iteration) in newest:
            live.add(record.key)
    live |= _references(records, live)
    return live | _champions(store) if keep_champions else live


def _newest(records: Sequence[Recorded], keep_last: int) -> set[tuple[str, str, int | None]]:
    """The last iterations of each fine-tune: those of the run that worked last, by number, then of the run before.

    Not by the time of what belongs to an iteration: an evaluation may end after the next policy is there. Iterations
    are counted by their policies: with staleness 1 the last policy's rollout bears the number after it.
    """
    worked: dict[tuple[str, str], Any] = {}
    places: dict[str, set[tuple[str, int]]] = {}
    trained: set[tuple[str, str, int | None]] = set()
    for record in records:
        manifest = record.manifest
        if manifest.iteration is not None and manifest.kind not in LASTING:
            run = manifest.fine_tune, manifest.run
            worked[run] = max(record.moment, worked.get(run, record.moment))
            places.setdefault(manifest.fine_tune, set()).add((manifest.run, manifest.iteration))
            if manifest.kind in COUNTED:
                trained.add((*run, manifest.iteration))
    newest = set()
    for fine_tune, found in places.items():
        order = sorted(found, key=lambda place, tune=fine_tune: (worked[tune, place[0]], place[1]))
        counted = [number for number, place in enumerate(order) if (fine_tune, *place) in trained]
        first = counted[-keep_last:][0] if counted else 0
        newest |= {(fine_tune, *place) for place in order[first:]}
    return newest


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
            pointer = dict(json.loads(store.get_bytes(stat.key)))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{stat.key} is not a pointer ({error}); restore or delete it, then collect") from None
        found |= {value for value in pointer.values() if isinstance(value, str) and value.startswith(PREFIX)}
    return found

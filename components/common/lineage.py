"""The history of fine-tunes, rebuilt from the manifests in the store alone: what there is, and what it derives from."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.common.errors import ArtifactError, ArtifactNotFound
from components.common.manifest import Manifest
from components.common.scheduling import in_parallel
from components.common.store import Store

PREFIX = "manifests/"
READERS = 16
SHORTEST = 6
"""Hexadecimal digits of a digest that are enough to name an artifact."""


@dataclass(frozen=True)
class Recorded:
    """A manifest and where it lies in the store."""

    key: str
    manifest: Manifest

    @property
    def name(self) -> str:
        """Its key without what all keys share: `fine-tune/run/iteration/name`."""
        return self.key.removeprefix(PREFIX).removesuffix(".json")

    @property
    def moment(self) -> tuple[object, int]:
        """When it was made; iterations order what was made within one second."""
        return self.manifest.created, -1 if self.manifest.iteration is None else self.manifest.iteration


@dataclass(frozen=True)
class Node:
    """An artifact in a line of descent."""

    role: str
    """What it was to the artifact that derives from it; empty for the one asked for."""
    digest: str
    found: Recorded | None
    """None: the store has no manifest of it."""
    parents: list["Node"] = field(default_factory=list)
    repeated: bool = False
    """Its own parents are shown where it came first."""


def history(store: Store, prefix: str = "", *, but: Collection[str] = ()) -> list[Recorded]:
    """All manifests whose name starts with `prefix` (`fine-tune/run/…`), oldest first; without those of the keys `but`.

    Raises:
        ArtifactError: one of them cannot be read.
    """
    keys = [stat.key for stat in store.list(PREFIX + prefix) if stat.key.endswith(".json") and stat.key not in but]
    found = in_parallel(READERS, lambda key: _read(store, key), keys)
    return sorted((one for one in found if one), key=lambda one: (one.moment, one.key))


def _read(store: Store, key: str) -> Recorded | None:
    try:
        return Recorded(key, Manifest.parse(store.get_bytes(key), where=key))
    except ArtifactNotFound:  # deleted since it was listed
        return None


def find(store: Store, reference: str) -> Recorded:
    """The artifact of a reference: a name as `ls` prints it, a manifest file, or the start of a digest.

    Raises:
        ArtifactNotFound: there is none.
        ArtifactError: the digest's start fits several artifacts.
    """
    if Path(reference).is_file():
        return Recorded(reference, Manifest.load(Path(reference)))
    digits = reference.removeprefix("blake3:")
    if re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", digits):
        fitting = [one for one in history(store) if one.manifest.digest.startswith("blake3:" + digits)]
        if len({one.manifest.digest for one in fitting}) > 1:
            raise ArtifactError(
                f"{reference} fits {', '.join(sorted({one.name for one in fitting}))}; give more digits"
            )
        if fitting:
            return fitting[-1]
    key = PREFIX + reference.removeprefix(PREFIX).removesuffix(".json") + ".json"
    if store.stat(key) is None:
        raise ArtifactNotFound(f"{store.url} has no artifact {reference}; `grpo artifacts ls` names them all")
    return Recorded(key, Manifest.parse(store.get_bytes(key), where=key))


def lineage(records: Sequence[Recorded], of: Recorded) -> Node:
    """Everything an artifact derives from, down to what has no parents."""
    by_digest: dict[str, list[Recorded]] = {}
    for record in records:
        by_digest.setdefault(record.manifest.digest, []).append(record)
    seen: set[str] = set()

    def node(role: str, found: Recorded) -> Node:
        repeated = found.key in seen
        seen.add(found.key)
        parents = [] if repeated else [parent(found, role, it) for role, it in sorted(found.manifest.parents.items())]
        return Node(role, found.manifest.digest, found, parents, repeated)

    def parent(child: Recorded, role: str, digest: str) -> Node:
        found = _nearest(by_digest.get(digest, []), child)
        return node(role, found) if found else Node(role, digest, None)

    return node("", of)


def _nearest(candidates: Sequence[Recorded], child: Recorded) -> Recorded | None:
    """Of artifacts with the same content the one the child read: of its own run if possible, made last before it."""
    before = [one for one in candidates if one.key != child.key and one.moment <= child.moment]
    mine = (child.manifest.fine_tune, child.manifest.run)

    def rank(one: Recorded) -> tuple[bool, bool, tuple[object, int]]:
        where = (one.manifest.fine_tune, one.manifest.run)
        return where == mine, where[0] == mine[0], one.moment

    return max(before, key=rank, default=None)


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it."""
    yield node
    for parent in node.parents:
        yield from walk(parent)

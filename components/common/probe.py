"""What an object store can do, tried out: some servers take a condition or a checksum and ignore it in silence."""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from components.common.errors import ArtifactError
from components.common.integrity import checksum
from components.common.s3_store import S3Store
from components.common.store import Store

RACES = 5
RACERS = 8
PART = 5 << 20
"""Bytes of the smallest part S3 takes."""


@dataclass(frozen=True)
class Capability:
    """One thing that was tried."""

    name: str
    good: bool
    needed: bool
    """Whether the pipeline must not run without it."""
    detail: str
    """What was seen, and what follows when it is missing."""


def probe(store: Store) -> list[Capability]:
    """Tries everything under a fresh prefix of the store and removes it again.

    Raises:
        ArtifactError: the store cannot be written to or read from at all.
    """
    prefix = f"probe/{uuid.uuid4().hex}"
    try:
        return list(_try_all(store, prefix))
    finally:
        for stat in list(store.list(prefix + "/")):
            store.delete(stat.key)


def _try_all(store: Store, prefix: str) -> Iterator[Capability]:
    store.put_bytes(b"probe", f"{prefix}/plain")
    same = store.get_bytes(f"{prefix}/plain") == b"probe"
    yield Capability("write, read, delete", same, True, "an object comes back as it was written")
    listed = [stat.key for stat in store.list(prefix + "/")] == [f"{prefix}/plain"]
    yield Capability("list after write", listed, True, "a new object is listed at once")
    yield _race(store, prefix)
    if isinstance(store, S3Store):
        for name, act, needed, detail in (
            ("checksums", _checksum, False, "without: damage on the way in shows only when the object is read"),
            ("ranges", _ranges, True, "large files are read in parallel ranges"),
            ("resumable uploads", _parts, False, "without: an interrupted upload begins anew"),
        ):
            yield _tried(name, act, needed, detail, store, prefix)


def _race(store: Store, prefix: str) -> Capability:
    """Several writers at once want one name, several times over: one of them each time must get it."""
    winners = []
    for turn in range(RACES):
        with ThreadPoolExecutor(RACERS) as pool:
            texts = [f"writer {number}".encode() for number in range(RACERS)]
            won = list(
                pool.map(lambda text, turn=turn: store.put_bytes(text, f"{prefix}/{turn}", if_absent=True), texts)
            )
        winners.append(sum(won))
    good = winners == [1] * RACES
    detail = "two writers of one manifest cannot both win"
    if not good:
        detail = f"{RACERS} racing writers had {winners} winners; two runs of one name could overwrite each other"
    return Capability("conditional writes", good, True, detail)


def _tried(
    name: str, act: Callable[[S3Store, str], bool], needed: bool, detail: str, store: S3Store, prefix: str
) -> Capability:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return Capability(name, act(store, prefix), needed, detail)
    except (ClientError, BotoCoreError, ArtifactError) as error:
        return Capability(name, False, needed, f"{detail} ({error})")


def _checksum(store: S3Store, prefix: str) -> bool:
    """A body that is not what its checksum says must be refused."""
    from botocore.exceptions import ClientError

    try:
        store.client.put_object(Body=b"other bytes", **store.name(f"{prefix}/checksum"), **checksum(b"bytes"))
    except ClientError:
        return True
    return False


def _ranges(store: S3Store, prefix: str) -> bool:
    store.put_bytes(b"0123456789", f"{prefix}/ranges")
    answer = store.client.get_object(**store.name(f"{prefix}/ranges"), Range="bytes=3-5")
    return bool(answer["Body"].read() == b"345" and answer["ContentRange"] == "bytes 3-5/10")


def _parts(store: S3Store, prefix: str) -> bool:
    """A part that was sent is told of, so that a resumed upload can leave it out."""
    name: dict[str, Any] = store.name(f"{prefix}/parts")
    upload = store.client.create_multipart_upload(**name, ChecksumAlgorithm="CRC32C")
    name["UploadId"] = upload["UploadId"]
    try:
        data = bytes(PART)
        store.client.upload_part(**name, PartNumber=1, Body=data, **checksum(data))
        parts = store.client.list_parts(**name).get("Parts", [])
        return [(part["PartNumber"], part["Size"]) for part in parts] == [(1, PART)]
    finally:
        store.client.abort_multipart_upload(**name)

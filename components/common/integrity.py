"""What proves that bytes are the bytes that were meant: CRC32C on the way, BLAKE3 for good."""

import re
from base64 import b64encode
from hashlib import md5
from typing import Any

from components.common.errors import StoreError

BLOB = re.compile(r"(?:^|/)blobs/blake3/([0-9a-f]{64})$")
DIGEST_HEADER = "blake3"
"""Metadata of an object that is not named by its content."""


class Damaged(Exception):
    """Bytes arrived cut or changed; asking again mends it."""


def blob_key(digest: str) -> str:
    """Key of the object with this content: `blake3:<hex>` → `blobs/blake3/<hex>`.

    Raises:
        StoreError: not a digest.
    """
    key = "blobs/" + digest.replace(":", "/", 1)
    if not BLOB.fullmatch(key):
        raise StoreError(f"not a digest: {digest!r}")
    return key


def checksum(data: bytes) -> dict[str, str]:
    """Arguments that make the server refuse a body that changed on its way."""
    return {"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": crc32c(data)}


def crc32c(data: bytes) -> str:
    """As S3 writes it."""
    import google_crc32c

    return b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def check_stored(answer: dict[str, Any], data: bytes, sums: dict[str, str]) -> None:
    """Checks what the server says it stored: by the CRC32C in `sums`, or by MD5 when it knows no CRC32C.

    Raises:
        Damaged: it stored something else.
    """
    if stored := answer.get("ChecksumCRC32C"):
        good = stored == sums["ChecksumCRC32C"]
    else:
        etag = answer.get("ETag", "").strip('"')
        good = not re.fullmatch(r"[0-9a-f]{32}", etag) or etag == md5(data, usedforsecurity=False).hexdigest()
    if not good:
        raise Damaged("the server stored other bytes than were sent")


def wanted_digest(key: str, answer: dict[str, Any]) -> str | None:
    """BLAKE3 the object must have, in hexadecimal: its name says it, or its metadata; None: put there by others."""
    name = BLOB.search(key)
    return name.group(1) if name else answer.get("Metadata", {}).get(DIGEST_HEADER)

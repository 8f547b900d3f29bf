"""An S3 bucket as an object store: parallel, verified on every read, resumable, and safe when writers race.

Integrity: each part travels with its CRC32C, which the server checks; each object carries its BLAKE3 in its name
(`blobs/blake3/<hex>`) or in its metadata, which the reader checks. boto3 verifies neither a multipart download nor
a range.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from components.common.errors import ArtifactNotFound, DigestMismatch, StoreError
from components.common.integrity import DIGEST_HEADER, Damaged, check_stored, checksum, wanted_digest
from components.common.s3_client import Location, Requests, code_of, make_client, status_of
from components.common.store import Stat, checked_key, checked_prefix, disk_errors
from components.common.transfer import Download, Upload, arriving

T = TypeVar("T")
DAMAGE_ATTEMPTS = 6
"""Reads of one object with a wrong digest, or writes of it that arrive damaged, before it is given up."""
SURE = 3
"""Equal wrong digests that show that an object is stored so: two may be chance, or a broken box on the way."""


class S3Store:
    """Objects of one bucket, below one prefix."""

    def __init__(self, location: Location, client: Any = None) -> None:
        self.location = location
        self.url = location.url
        self.bucket = location.bucket
        self.page = 1000
        self.client = client or make_client(location.options)
        self.request = Requests(location)
        self.pool = ThreadPoolExecutor(location.options.connections, thread_name_prefix="s3")
        self._upload, self._download = Upload(self), Download(self)

    @classmethod
    def from_url(cls, url: str) -> "S3Store":
        """Opens `s3://bucket/prefix?endpoint=...`; nothing is sent yet."""
        return cls(Location.parse(url))

    def name(self, key: str) -> dict[str, str]:
        """Bucket and full key, as boto3 wants them."""
        prefix = f"{self.location.prefix}/" if self.location.prefix else ""
        return {"Bucket": self.bucket, "Key": prefix + checked_key(key)}

    def put_file(self, path: Path, key: str) -> None:
        """Uploads in parallel parts; a blob whose upload was cut short goes on where it stopped."""
        self._upload(path, key)

    def get_file(self, key: str, path: Path) -> None:
        """Downloads in parallel ranges and checks the object's BLAKE3.

        Raises:
            ArtifactNotFound, DigestMismatch, StoreError
        """
        from components.common.manifest import file_digest

        def read() -> tuple[None, str | None, str]:
            with disk_errors(f"write {path}"):
                wanted = self._download(key, path)
                return None, wanted, file_digest(path).removeprefix("blake3:")

        try:
            self._sound(key, read)
        except DigestMismatch:
            path.unlink(missing_ok=True)
            raise

    def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False, instead_of: bytes | None = None) -> bool:
        """Stores bytes; with `if_absent` or `instead_of` the server decides which of racing writers wins.

        A writer signs the object: when an answer is lost and the next attempt finds the name taken, it sees whether the
        taker was itself. What it has won it reads back, since a name that is taken by damaged bytes stays taken, and
        some servers repeat the checksum they were sent unchecked.
        """
        from blake3 import blake3
        from botocore.exceptions import ClientError

        writer, sums = uuid.uuid4().hex, checksum(data)
        arguments = self.name(key) | {"Metadata": {DIGEST_HEADER: blake3(data).hexdigest(), "writer": writer}}
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        if instead_of is not None:
            try:
                present, answer = self._get(key)
            except ArtifactNotFound:
                return False
            if present != instead_of:
                return False
            condition = {"IfMatch": answer["ETag"]}
        guarded = bool(condition)

        def put(attempt: int) -> None:
            check_stored(self.client.put_object(Body=data, **sums, **arguments, **condition), data, sums)

        for _ in range(DAMAGE_ATTEMPTS):
            won = True
            try:
                self.request(f"writing {key}", put)
            except ClientError as error:
                if status_of(error) != 412:
                    raise StoreError(f"{self.url}: writing {key}: {error}") from error
                won = False
            if not guarded:
                return won
            stored, answer = self._get(key)
            if answer.get("Metadata", {}).get("writer") != writer:
                return won
            if stored == data:
                return True
            condition = {"IfMatch": answer["ETag"]}
        raise StoreError(f"{self.url}: writing {key}: the server stored other bytes {DAMAGE_ATTEMPTS} times over")

    def get_bytes(self, key: str) -> bytes:
        """Reads a whole object and checks it. Raises ArtifactNotFound, DigestMismatch."""
        from blake3 import blake3

        def read() -> tuple[bytes, str | None, str]:
            data, answer = self._get(key)
            return data, wanted_digest(key, answer), blake3(data).hexdigest()

        return self._sound(key, read)

    def _sound(self, key: str, read: Callable[[], tuple[T, str | None, str]]) -> T:
        """Reads until the digest is the wanted one. `read` gives what it read, the digest wanted and the one got."""
        seen: Counter[str] = Counter()
        for _ in range(DAMAGE_ATTEMPTS):
            result, wanted, got = read()
            if wanted in (None, got):
                return result
            seen[got] += 1
            if seen[got] == SURE:
                break
        raise DigestMismatch(
            f"{self.url}: {key} was changed or cut: want {wanted}, got {got}; "
            + ("delete it and make it again" if seen[got] == SURE else "each time another: check the network")
        )

    def _get(self, key: str) -> tuple[bytes, dict[str, Any]]:
        """An object's bytes, not yet checked, and the answer's head."""

        def get(attempt: int) -> tuple[bytes, dict[str, Any]]:
            answer = self.client.get_object(**self.name(key))
            data = b"".join(arriving(answer, self.location.options.timeout))
            if len(data) != answer["ContentLength"]:
                raise Damaged(f"{len(data)} of {answer['ContentLength']} bytes arrived")
            return data, answer

        return self.found(key, lambda: self.request(f"reading {key}", get))

    def found(self, key: str, act: Any) -> Any:
        """Runs `act`; a 404 becomes ArtifactNotFound."""
        from botocore.exceptions import ClientError

        try:
            return act()
        except ClientError as error:
            if status_of(error) == 404:
                raise ArtifactNotFound(f"{self.url}: no object {key}") from None
            raise StoreError(f"{self.url}: {key}: {error}") from error

    def stat(self, key: str) -> Stat | None:
        """None: no such object."""
        try:
            answer = self.found(key, lambda: self._head(key))
        except ArtifactNotFound:
            return None
        return Stat(key, answer["ContentLength"], answer["LastModified"])

    def _head(self, key: str) -> Any:
        from botocore.exceptions import ClientError

        def head(attempt: int) -> Any:
            try:
                return self.client.head_object(**self.name(key))
            except ClientError as error:
                if status_of(error) not in (400, 403):
                    raise
            return self.client.get_object(**self.name(key), Range="bytes=0-0")  # a HEAD does not say what is wrong

        return self.request(f"looking up {key}", head)

    def list(self, prefix: str) -> Iterator[Stat]:
        """Objects below a prefix, a thousand a request."""
        start = f"{self.location.prefix}/" if self.location.prefix else ""
        more: dict[str, str] = {}
        while True:
            page = self.request(
                f"listing {prefix}",
                lambda _, more=more: self.client.list_objects_v2(
                    Bucket=self.bucket, Prefix=start + checked_prefix(prefix), MaxKeys=self.page, **more
                ),
            )
            for found in page.get("Contents", []):
                yield Stat(found["Key"].removeprefix(start), found["Size"], found["LastModified"])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def touch(self, key: str) -> None:
        """Copies an object onto itself, on the server; no byte comes here."""
        self.found(key, lambda: self._upload.renew(key, self._head(key)))

    def delete(self, key: str, *, before: datetime | None = None) -> bool:
        """Removes an object. Its age is looked at before each attempt: between two someone may write it again."""
        from botocore.exceptions import ClientError

        def remove(attempt: int) -> bool:
            if before and self.client.head_object(**self.name(key))["LastModified"] >= before:
                return False
            self.client.delete_object(**self.name(key))
            return True

        try:
            return self.request(f"deleting {key}", remove)
        except ClientError as error:
            if status_of(error) != 404:
                raise StoreError(f"{self.url}: deleting {key}: {error}") from error
            return False

    def unfinished(self, key: str = "") -> Iterator[dict[str, Any]]:
        """Multipart uploads that were begun and not ended, of one key or of all, newest first."""
        full = self.name(key)["Key"] if key else (f"{self.location.prefix}/" if self.location.prefix else "")
        found: list[dict[str, Any]] = []
        more: dict[str, str] = {}
        while True:
            page = self.request(
                "listing uploads",
                lambda _, more=more: self.client.list_multipart_uploads(
                    Bucket=self.bucket, Prefix=full, MaxUploads=self.page, **more
                ),
            )
            found += [entry for entry in page.get("Uploads", []) if not key or entry["Key"] == full]
            if not page.get("IsTruncated"):
                break
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        yield from sorted(found, key=lambda entry: entry["Initiated"], reverse=True)

    def abort(self, upload: dict[str, Any]) -> None:
        """Drops an unfinished upload and the parts it holds."""
        from botocore.exceptions import ClientError

        name = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        try:
            self.request("aborting an upload", lambda _: self.client.abort_multipart_upload(**name))
        except ClientError as error:  # gone already: ended or aborted by another
            if code_of(error) != "NoSuchUpload":
                raise StoreError(f"{self.url}: {error}") from error

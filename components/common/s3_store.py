"""An S3 bucket as an object store: parallel, verified on every read, resumable, and safe when writers race.

Integrity: each part travels with its CRC32C, which the server checks; each object carries its BLAKE3 in its name
(`blobs/blake3/<hex>`) or in its metadata, which the reader checks. boto3 verifies neither a multipart download nor
a range.
"""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from components.common.errors import ArtifactNotFound, DigestMismatch, StoreError
from components.common.integrity import DIGEST_HEADER, Damaged, check_stored, checksum, wanted_digest
from components.common.s3_client import Location, Requests, code_of, make_client, status_of
from components.common.store import Stat, checked_key, checked_prefix, disk_errors
from components.common.transfer import Download, Upload

DAMAGE_ATTEMPTS = 6
"""Downloads of one object with a wrong digest, each wrong in another way, before it is given up."""


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

        seen = set()
        for _ in range(DAMAGE_ATTEMPTS):
            with disk_errors(f"write {path}"):
                wanted = self._download(key, path)
                got = file_digest(path).removeprefix("blake3:")
            if wanted in (None, got):
                return
            if got in seen:  # wrong in the same way twice: it is stored so
                break
            seen.add(got)
        path.unlink(missing_ok=True)
        raise self._changed(key, wanted, got)

    def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False) -> bool:
        """Stores bytes; with `if_absent` the server decides which of racing writers wins.

        A writer signs the object: when an answer is lost and the second attempt finds the name taken, it sees whether
        the taker was itself.
        """
        from blake3 import blake3
        from botocore.exceptions import ClientError

        writer = uuid.uuid4().hex
        arguments = self.name(key) | {"Metadata": {DIGEST_HEADER: blake3(data).hexdigest(), "writer": writer}}
        if if_absent:
            arguments["IfNoneMatch"] = "*"
        sums, attempts = checksum(data), []

        def put(attempt: int) -> None:
            attempts.append(attempt)
            check_stored(self.client.put_object(Body=data, **sums, **arguments), data, sums)

        try:
            self.request(f"writing {key}", put)
        except ClientError as error:
            if status_of(error) != 412:
                raise StoreError(f"{self.url}: writing {key}: {error}") from error
            return len(attempts) > 1 and self._metadata(key).get("writer") == writer
        return True

    def get_bytes(self, key: str) -> bytes:
        """Reads a whole object and checks it. Raises ArtifactNotFound, DigestMismatch."""
        from blake3 import blake3

        seen = set()
        for _ in range(DAMAGE_ATTEMPTS):
            data, wanted = self._read(key)
            got = blake3(data).hexdigest()
            if wanted in (None, got):
                return data
            if got in seen:
                break
            seen.add(got)
        raise self._changed(key, wanted, got)

    def _changed(self, key: str, wanted: str | None, got: str) -> DigestMismatch:
        return DigestMismatch(
            f"{self.url}: {key} was changed or cut: want {wanted}, got {got}; delete it and make it again"
        )

    def _read(self, key: str) -> tuple[bytes, str | None]:
        def get(attempt: int) -> tuple[bytes, str | None]:
            answer = self.client.get_object(**self.name(key))
            data = answer["Body"].read()
            if len(data) != answer["ContentLength"]:
                raise Damaged(f"{len(data)} of {answer['ContentLength']} bytes arrived")
            return data, wanted_digest(key, answer)

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

    def _metadata(self, key: str) -> dict[str, str]:
        return dict(self.found(key, lambda: self._head(key)).get("Metadata", {}))

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
        page = self.request(
            "listing uploads", lambda _: self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=full)
        )
        found = [entry for entry in page.get("Uploads", []) if not key or entry["Key"] == full]
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

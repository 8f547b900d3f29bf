"""Large objects to and from S3: parts and ranges in parallel, each retried by itself."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from hashlib import md5
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import ArtifactNotFound, StoreError
from components.common.integrity import BLOB, DIGEST_HEADER, Damaged, check_stored, checksum, crc32c, wanted_digest
from components.common.s3_client import MIB, code_of, status_of

if TYPE_CHECKING:
    from components.common.s3_store import S3Store

MAX_PARTS = 10_000
COPY_BYTES = 5 << 30
"""Bytes that a server copies in one request (S3's limit); larger objects are copied in ranges."""
CHUNK = 1 * MIB
"""Bytes taken from a socket at a time, at most."""
PIECE = 128 << 10
"""Bytes handed to a socket at a time."""
SLOWEST = 1024
"""Bytes a second below which a body counts as stalled: each byte alone would start the socket's timeout anew."""


def part_bytes(size: int, wanted: int) -> int:
    """Size of a part: as wanted, larger when 10,000 such parts (S3's limit) do not suffice; whole MiB."""
    return max(wanted, math.ceil(size / MAX_PARTS / MIB) * MIB)


class Upload:
    """Sends a file; a resumed upload sends only the parts the server lacks."""

    def __init__(self, store: "S3Store") -> None:
        self.store = store

    def __call__(self, path: Path, key: str) -> None:
        from components.common.manifest import file_digest

        size = path.stat().st_size
        part = part_bytes(size, self.store.location.options.part_mib * MIB)
        named = BLOB.search(key)
        digest = named.group(1) if named else file_digest(path).removeprefix("blake3:")
        metadata = {"Metadata": {DIGEST_HEADER: digest}}
        if size <= part:
            self._whole(path.read_bytes(), key, metadata)
        else:
            self._parts(path, key, size, part, metadata, resume=bool(named))

    def _whole(self, data: bytes, key: str, metadata: dict[str, Any]) -> None:
        sums = checksum(data)
        arguments = self.store.name(key) | metadata | sums
        put = self.store.client.put_object
        self.store.request(f"writing {key}", lambda _: check_stored(put(Body=data, **arguments), data, sums))

    def _parts(self, path: Path, key: str, size: int, part: int, metadata: dict[str, Any], *, resume: bool) -> None:
        """Only a blob's upload is resumed: its name promises that the parts are of the same content."""
        from botocore.exceptions import ClientError

        name, before = self.store.name(key), self.store.stat(key)
        numbers = range(1, math.ceil(size / part) + 1)
        try:
            begun, there = self._begun(key, size, part) if resume else (None, {})
            name["UploadId"] = begun or self._begin(name, key, metadata)
            with path.open("rb") as file:
                sent = self._send(file.fileno(), name, key, numbers, part, there)
            self._complete(name, key, size, sent)
        except ClientError as error:
            if code_of(error) not in ("NoSuchUpload", "InvalidPart"):
                raise StoreError(f"{self.store.url}: writing {key}: {error}") from error
            if code_of(error) == "InvalidPart":  # another writer sent parts of another size under the same numbers
                self.store.abort(name)
            found = self.store.stat(key)  # another writer of the same blob, or our own lost request, ended this upload
            new = found and found.size == size and (before is None or found.modified > before.modified)
            if not new:
                self._parts(path, key, size, part, metadata, resume=False)

    def _begun(self, key: str, size: int, part: int) -> tuple[str | None, dict[int, dict[str, Any]]]:
        """An unfinished upload in parts of this size, and those the server holds of it; none: begin another."""
        for upload in self.store.unfinished(key):
            there = self._stored_parts(self.store.name(key) | {"UploadId": upload["UploadId"]}, key)
            if all(stored["Size"] == min(part, size - (number - 1) * part) for number, stored in there.items()):
                return str(upload["UploadId"]), there
        return None, {}

    def _begin(self, name: dict[str, Any], key: str, metadata: dict[str, Any]) -> str:
        begin = self.store.client.create_multipart_upload
        answer = self.store.request(f"writing {key}", lambda _: begin(**name, **metadata, ChecksumAlgorithm="CRC32C"))
        return str(answer["UploadId"])

    def _stored_parts(self, name: dict[str, Any], key: str) -> dict[int, dict[str, Any]]:
        """Parts the server holds already, by number."""
        found: dict[int, dict[str, Any]] = {}
        marker = 0
        while True:
            page = self.store.request(
                f"resuming {key}", lambda _, at=marker: self.store.client.list_parts(**name, PartNumberMarker=at)
            )
            found |= {part["PartNumber"]: part for part in page.get("Parts", [])}
            if not page.get("IsTruncated"):
                return found
            marker = int(page["NextPartNumberMarker"])

    def _send(
        self,
        file: int,
        name: dict[str, Any],
        key: str,
        numbers: Iterable[int],
        part: int,
        there: dict[int, dict[str, Any]],
    ) -> list[dict[str, Any]]:
        def send(number: int) -> dict[str, Any]:
            data = os.pread(file, part, (number - 1) * part)
            stored = there.get(number)
            if stored is None or not _same(stored, data):
                upload, sums = self.store.client.upload_part, checksum(data)

                def put(attempt: int) -> Any:
                    body = data if attempt else _Body(data)  # a slow line gets the library's small pieces
                    answer = upload(**name, PartNumber=number, Body=body, **sums)
                    check_stored(answer, data, sums)
                    return answer

                stored = self.store.request(f"writing part {number} of {key}", put)
            return _part(number, stored)

        return settle([self.store.pool.submit(send, number) for number in numbers])

    def _complete(self, name: dict[str, Any], key: str, size: int, parts: list[dict[str, Any]]) -> None:
        complete = self.store.client.complete_multipart_upload
        self.store.request(f"ending the upload of {key}", lambda _: complete(**name, MultipartUpload={"Parts": parts}))
        found = self.store.stat(key)
        if found is None or found.size != size:
            got = f"{found.size} bytes" if found else "nothing"
            raise StoreError(f"{self.store.url}: {key}: sent {size} bytes, the server shows {got}; run it again")

    def renew(self, key: str, head: dict[str, Any], *, again: bool = True) -> None:
        """Copies an object, as `head` describes it, onto itself; its bytes do not leave the server.

        The name must say the content, as a blob's does: another may write or copy it meanwhile.
        """
        from botocore.exceptions import ClientError

        name, size, client = self.store.name(key), head["ContentLength"], self.store.client
        source, metadata = {"CopySource": dict(name)}, {"Metadata": head.get("Metadata", {})}
        if size <= COPY_BYTES:
            whole = name | source | metadata | {"MetadataDirective": "REPLACE"}
            self.store.request(f"copying {key}", lambda _: client.copy_object(**whole))
            return
        name["UploadId"] = self._begin(name, key, metadata)
        try:
            self._copy(name | source, name, key, size)
        except BaseException as error:
            self.store.abort(name)  # else a writer of the same blob takes it for an upload of its own
            if not (isinstance(error, ClientError) and code_of(error) in ("NoSuchUpload", "InvalidPart")):
                raise
            found = self.store.stat(key)  # our own lost request ended it, or another who writes the same blob
            if found is None:
                raise ArtifactNotFound(f"{self.store.url}: no object {key}") from error
            if found.modified > head["LastModified"]:
                return
            if not again:
                raise StoreError(
                    f"{self.store.url}: copying {key}: another ended the copy; run it again ({error})"
                ) from error
            self.renew(key, head, again=False)  # of the same second, in which servers tell times: not seen as younger

    def _copy(self, source: dict[str, Any], name: dict[str, Any], key: str, size: int) -> None:
        def copy(number: int, start: int) -> dict[str, Any]:
            span = {"PartNumber": number, "CopySourceRange": f"bytes={start}-{min(start + COPY_BYTES, size) - 1}"}
            part = self.store.request(f"copying {key}", lambda _: self.store.client.upload_part_copy(**source, **span))
            return _part(number, part["CopyPartResult"])

        tasks = [self.store.pool.submit(copy, *part) for part in enumerate(range(0, size, COPY_BYTES), 1)]
        self._complete(name, key, size, settle(tasks))


class _Body:
    """A part as the HTTP library reads it: in pieces larger than it asks for, which are not copied. Each has to be gone
    within the time that making a connection may take, ten seconds."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = memoryview(data), 0

    def __len__(self) -> int:
        return len(self.data)

    def read(self, size: int = -1) -> memoryview:
        end = len(self.data) if size < 0 else self.at + max(size, PIECE)
        piece = self.data[self.at : end]
        self.at += len(piece)
        return piece

    def tell(self) -> int:
        return self.at

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        self.at = at + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: len(self.data)}[whence]
        return self.at


def _part(number: int, stored: dict[str, Any]) -> dict[str, Any]:
    """A stored part as the end of its upload names it: with the checksum where the server tells it (AWS insists)."""
    sums = {"ChecksumCRC32C": stored["ChecksumCRC32C"]} if "ChecksumCRC32C" in stored else {}
    return {"PartNumber": number, "ETag": stored["ETag"], **sums}


def _same(stored: dict[str, Any], data: bytes) -> bool:
    """Whether a part on the server is this data."""
    if stored["Size"] != len(data):
        return False
    if "ChecksumCRC32C" in stored:
        return bool(stored["ChecksumCRC32C"] == crc32c(data))
    return bool(stored["ETag"].strip('"') == md5(data, usedforsecurity=False).hexdigest())


class Download:
    """Brings an object straight into place: the file gets its full length first, then ranges fill it in parallel."""

    def __init__(self, store: "S3Store") -> None:
        self.store = store

    def __call__(self, key: str, path: Path) -> str | None:
        """Writes the object to `path`; gives the BLAKE3 it should have, in hexadecimal, if that is known."""
        part = self.store.location.options.part_mib * MIB
        rest: list[Future[Any]] = []
        with path.open("wb") as file:

            def begin(answer: Any) -> None:
                """The first answer tells the size: the other ranges start while its own body still comes."""
                if rest or (size := _total(answer)) <= part:
                    return
                os.posix_fallocate(file.fileno(), 0, size)
                for at in range(part, size, part):
                    end = min(at + part, size)
                    rest.append(self.store.pool.submit(self._range, key, file.fileno(), at, end, answer["ETag"], None))

            try:
                answer = self.store.found(key, lambda: self._range(key, file.fileno(), 0, part, None, begin))
            except BaseException:
                for task in rest:
                    task.cancel()
                wait(rest)  # the file stays open until no thread writes to it
                raise
            self.store.found(key, lambda: settle(rest))
        return wanted_digest(key, answer)

    def _range(
        self, key: str, file: int, start: int, end: int, etag: str | None, begin: Callable[[Any], None] | None
    ) -> Any:
        """Bytes [start, end) of the object; an attempt goes on where the one before was cut, and one that got some
        bytes is followed by the next without a pause. All are of the version with that `etag`, or of the first one's;
        of a blob any version will do, since its name says its content."""
        position, goal = start, end

        def get(attempt: int) -> Any:
            nonlocal position, goal, etag
            before = position
            answer = self._get(key, position, end, {} if etag is None or BLOB.search(key) else {"IfMatch": etag})
            etag = answer["ETag"]
            if begin:
                begin(answer)
            goal = position + answer["ContentLength"]
            try:
                for piece in arriving(answer, self.store.location.options.timeout):
                    position += os.pwrite(file, piece, position)
            except broken_bodies():
                if position == before:
                    raise
            if before == position < goal:
                raise Damaged(f"none of {goal - start} bytes arrived")
            return answer

        while True:
            answer = self.store.request(f"reading {key}", get)
            if position >= goal:
                return answer

    def _get(self, key: str, start: int, end: int, same: dict[str, str]) -> Any:
        from botocore.exceptions import ClientError

        name = self.store.name(key)
        try:
            return self.store.client.get_object(**name, Range=f"bytes={start}-{end - 1}", **same)
        except ClientError as error:
            if status_of(error) != 416:
                raise
        return self.store.client.get_object(**name)  # an empty object has no first byte


def arriving(answer: Any, timeout: float) -> Iterator[bytes]:
    """An answer's body in pieces, as they come.

    Raises:
        Damaged: after `timeout` seconds fewer than SLOWEST bytes a second have come.
    """
    started, got = time.monotonic(), 0
    stream = answer["Body"]._raw_stream  # boto3's own `read` waits for as much as it was asked for, drop by drop
    while piece := stream.read1(CHUNK, decode_content=False):
        yield piece
        got += len(piece)
        seconds = time.monotonic() - started
        if seconds > timeout and got < seconds * SLOWEST:
            answer["Body"].close()
            raise Damaged(f"{got} bytes arrived in {seconds:.0f} s")


def broken_bodies() -> tuple[type[Exception], ...]:
    """What reading an answer's body raises when the connection fails."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return HTTPClientError, IncompleteReadError, HTTPError, ConnectionError


def _total(answer: Any) -> int:
    """Size of the whole object, in bytes."""
    return int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else int(answer["ContentLength"])


def settle(tasks: list[Future[Any]]) -> list[Any]:
    """Results of tasks; the first failure cancels those that have not begun and waits for those that have."""
    done, waiting = wait(tasks, return_when=FIRST_EXCEPTION)
    for task in waiting:
        task.cancel()
    wait(tasks)
    for task in done:
        task.result()
    return [task.result() for task in tasks]

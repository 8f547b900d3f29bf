"""The S3 store on a bad day: a network and a server that fail in every way, and what must never be lost."""

import os
import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import HTTPClientError

from components.common import transfer
from components.common.errors import ArtifactNotFound, DigestMismatch, StoreError
from components.common.integrity import blob_key, checksum
from components.common.manifest import file_digest
from components.common.s3_store import S3Store
from tests.common.fault_proxy import DRIP, FAULTS, FaultProxy, proxy

OPERATIONS = 1000
THREADS = 8
MIB = 1 << 20


def through(url: str, options: str) -> S3Store:
    return S3Store.from_url(f"s3://grpo/{uuid.uuid4().hex[:12]}?endpoint={url}&part_mib=5{options}")


class Worker:
    """Random operations on names of its own, checked against what the store must hold by then."""

    def __init__(self, store: S3Store, folder: Path, number: int) -> None:
        self.store, self.folder, self.number = store, folder, number
        self.random = random.Random(number)
        self.holds: dict[str, bytes] = {}
        folder.mkdir()

    def key(self) -> str:
        return f"worker{self.number}/{self.random.randrange(12)}"

    def put(self) -> None:
        key, data = self.key(), self.random.randbytes(self.random.randrange(4000))
        assert self.store.put_bytes(data, key)
        self.holds[key] = data

    def claim(self) -> None:
        key, data = self.key(), self.random.randbytes(100)
        won = self.store.put_bytes(data, key, if_absent=True)
        assert won == (key not in self.holds)  # exact even when the answer to the winning attempt was lost
        self.holds.setdefault(key, data)

    def upload(self) -> None:
        key, path = self.key(), self.folder / "up"
        size = self.random.choice([10_000, 300_000, 5 * MIB + 7])
        path.write_bytes(self.random.randbytes(size))
        self.store.put_file(path, key)
        self.holds[key] = path.read_bytes()

    def get(self) -> None:
        key = self.key()
        if key in self.holds:
            assert self.store.get_bytes(key) == self.holds[key]
        else:
            with pytest.raises(ArtifactNotFound):
                self.store.get_bytes(key)

    def download(self) -> None:
        key, path = self.key(), self.folder / "down"
        if key in self.holds:
            self.store.get_file(key, path)
            assert path.read_bytes() == self.holds[key]

    def look(self) -> None:
        key = self.key()
        found = self.store.stat(key)
        assert (found.size if found else None) == (len(self.holds[key]) if key in self.holds else None)

    def list(self) -> None:
        found = {stat.key: stat.size for stat in self.store.list(f"worker{self.number}/")}
        assert found == {key: len(data) for key, data in self.holds.items()}

    def delete(self) -> None:
        key = self.key()
        self.store.delete(key)
        self.holds.pop(key, None)

    def work(self, count: int) -> int:
        acts = [self.put] * 6 + [self.get] * 8 + [self.claim] * 3 + [self.look] * 3
        acts += [self.download] * 4 + [self.delete] * 2 + [self.list] + [self.upload]
        for _ in range(count):
            self.random.choice(acts)()
        self.list()
        return count


def test_a_thousand_operations_with_a_fifth_of_all_requests_broken(rgw_endpoint: str, tmp_path: Path) -> None:
    # A request that timed out but is still under way may act after what followed it: stalls must outlast slow answers.
    with proxy(rgw_endpoint, share=0.2, stall=10.5) as server:
        store = through(server.url, "&timeout=10&deadline=120")
        workers = [Worker(store, tmp_path / str(number), number) for number in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            done = sum(pool.map(lambda worker: worker.work(OPERATIONS // THREADS), workers))
        assert done == OPERATIONS
        assert set(server.met) == set(FAULTS)
        assert 0.15 < server.met.total() / server.requests < 0.25
    straight = S3Store.from_url(store.url.replace(server.url, rgw_endpoint))
    for worker in workers:
        worker.store = straight
        worker.list()
        assert {key: straight.get_bytes(key) for key in worker.holds} == worker.holds


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_never_ends_is_given_up_at_the_deadline(moto_endpoint: str, tmp_path: Path, fault: str) -> None:
    with proxy(moto_endpoint, share=1.0, faults=[fault], stall=0.5) as server:
        store = through(server.url, "&timeout=0.3&deadline=1")
        patient = S3Store.from_url(f"s3://grpo/{store.location.prefix}?endpoint={moto_endpoint}")
        patient.put_bytes(bytes(1000), "name")
        with pytest.raises((StoreError, DigestMismatch), match=r"failed [0-9]+ times within|was changed or cut"):
            if fault == "change the request":  # this server checks nothing: what it holds then is found out on reading
                store.put_bytes(bytes(1000), "name")
            store.get_bytes("name")


class Scripted:
    """Which fault each request meets, in turn; then none. `same` flips the same bit each time."""

    def __init__(self, server: FaultProxy, *faults: str | None, same: bool = False) -> None:
        self.faults = list(faults)
        server.draw = lambda: self.faults.pop(0) if self.faults else None  # type: ignore[method-assign]
        if same:
            server.flipped = lambda data: bytes([data[0] ^ 4]) + data[1:]  # type: ignore[method-assign]


@pytest.mark.parametrize("times", [2, 3])
def test_damage_is_stored_damage_when_three_reads_agree(moto_endpoint: str, tmp_path: Path, times: int) -> None:
    with proxy(moto_endpoint, share=0.0) as server:
        store = through(server.url, "")
        store.put_bytes(bytes(1000), "name")
        for read in (lambda: store.get_bytes("name"), lambda: store.get_file("name", tmp_path / "target")):
            script = Scripted(server, *["change the body"] * times, same=True)
            if times == 2:  # by chance, or by a box on the way that soon is itself again
                read()
            else:
                with pytest.raises(DigestMismatch, match=r"was changed or cut.*delete it and make it again"):
                    read()
            assert script.faults == []
    assert (tmp_path / "target").exists() == (times == 2)


def test_damage_that_differs_each_time_is_not_laid_to_the_object(moto_endpoint: str) -> None:
    with proxy(moto_endpoint, share=0.0) as server:
        store = through(server.url, "")
        store.put_bytes(bytes(1000), "name")
        Scripted(server, *["change the body"] * 6)
        with pytest.raises(DigestMismatch, match="each time another: check the network"):
            store.get_bytes("name")


@pytest.mark.parametrize("answer", ["repeats the checksum", "tells the digest alone"])
@pytest.mark.parametrize(
    "faults",
    [["change the request"], ["change the request", None, "change the request"], ["change the request", "500", "500"]],
)
def test_a_guarded_name_that_was_written_damaged_is_mended_by_its_writer(
    moto_endpoint: str, faults: list[str | None], answer: str
) -> None:
    """This server checks nothing on the way in: the object is there, damaged, and the name is taken, by ourselves."""
    with proxy(moto_endpoint, share=0.0) as server:
        store = through(server.url, "")
        if answer == "tells the digest alone":
            drop = lambda parsed, **_: parsed.pop("ChecksumCRC32C", None)  # noqa: E731
            store.client.meta.events.register("after-call.s3.PutObject", drop)
        Scripted(server, *faults)
        assert store.put_bytes(b"manifest" * 100, "name", if_absent=True) is True
        assert store.get_bytes("name") == b"manifest" * 100
        assert store.put_bytes(b"other", "name", if_absent=True) is False
        assert store.get_bytes("name") == b"manifest" * 100


def test_a_name_that_others_took_is_left_alone_also_when_it_is_damaged(moto_endpoint: str) -> None:
    store = through(moto_endpoint, "")
    store.client.put_object(Body=b"x", **store.name("name"), Metadata={"blake3": "0" * 64, "writer": "another"})
    with proxy(moto_endpoint, share=0.0) as server:
        late = S3Store.from_url(store.url.replace(moto_endpoint, server.url))
        Scripted(server, "500")  # a second attempt, as if the first answer had been lost
        assert late.put_bytes(b"y", "name", if_absent=True) is False
    assert store.client.get_object(**store.name("name"))["Body"].read() == b"x"


def test_a_network_that_damages_every_write_is_given_up(moto_endpoint: str) -> None:
    with proxy(moto_endpoint, share=0.0) as server:
        store = through(server.url, "")
        server.draw = lambda: "change the request"  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="the server stored other bytes 6 times over"):
            store.put_bytes(b"manifest" * 100, "name", if_absent=True)


@pytest.mark.parametrize("act", ["get_bytes", "get_file"])
def test_a_body_that_drips_is_given_up_at_the_deadline(
    moto_endpoint: str, tmp_path: Path, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte comes well within the timeout, and all of them would take an hour. The body's clock runs a hundred
    times as fast as the socket's, so that no pause of this machine passes for a socket that timed out."""
    monkeypatch.setattr(transfer, "time", SimpleNamespace(monotonic=lambda: 100 * time.monotonic()))
    with proxy(moto_endpoint, share=0.0) as server:
        store = through(server.url, "&timeout=60&deadline=2")
        store.put_bytes(os.urandom(64 << 10), "name")
        server.draw = lambda: DRIP  # type: ignore[method-assign]
        with pytest.raises(
            StoreError, match=r"reading name failed [0-9]+ times within 2 s: [0-9]+ bytes arrived in [0-9]+ s"
        ):
            store.get_bytes("name") if act == "get_bytes" else store.get_file("name", tmp_path / "target")


def test_a_large_download_goes_on_where_it_was_cut(rgw_endpoint: str, tmp_path: Path) -> None:
    """Every answer is cut in half, so no range ever arrives whole; halves of halves do."""
    (tmp_path / "source").write_bytes(os.urandom(11 * MIB))
    with proxy(rgw_endpoint, share=0.9, faults=["cut the body"]) as server:
        store = through(server.url, "&deadline=60")
        S3Store.from_url(store.url.replace(server.url, rgw_endpoint)).put_file(tmp_path / "source", "file")
        store.get_file("file", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_an_upload_that_was_cut_short_goes_on(rgw_endpoint: str, tmp_path: Path) -> None:
    """A first attempt leaves two of four parts on the server; the second sends the other two."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(17 * MIB))
    store = through(rgw_endpoint, "")
    key = blob_key(file_digest(path))
    data = path.read_bytes()
    unfinished_upload(store, key, [data[: 5 * MIB], data[5 * MIB : 10 * MIB]])
    sent: list[int] = []
    store.client.meta.events.register(
        "provide-client-params.s3.UploadPart", lambda params, **_: sent.append(params["PartNumber"])
    )
    store.put_file(path, key)
    assert sorted(sent) == [3, 4]
    store.get_file(key, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == path.read_bytes()
    assert list(store.unfinished()) == []


def test_a_part_is_sent_in_small_pieces_once_larger_ones_did_not_go(moto_endpoint: str, tmp_path: Path) -> None:
    """Each piece has the time of a connection: on a slow line the library's own 16 KiB go where 128 do not."""
    store = through(moto_endpoint, "")
    source, sent = tmp_path / "source", []
    source.write_bytes(os.urandom((5 << 20) + 1))

    def slow_line(request: Any, **_: object) -> None:
        pieces = [len(piece) for piece in iter(lambda: request.body.read(16 << 10), b"")]
        request.body.seek(0)
        sent.append((max(pieces), sum(pieces)))
        if max(pieces) > 16 << 10:
            raise HTTPClientError(error="The write operation timed out")

    store.client.meta.events.register("before-send.s3.UploadPart", slow_line)
    store.put_file(source, "key")
    assert sorted(sent) == [(1, 1), (16 << 10, 5 << 20), (128 << 10, 5 << 20)]
    store.get_file("key", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_parts_that_are_not_of_this_file_are_sent_again(rgw_endpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(11 * MIB))
    store = through(rgw_endpoint, "")
    key = blob_key(file_digest(path))
    unfinished_upload(store, key, [bytes(5 * MIB)])
    store.put_file(path, key)
    store.get_file(key, tmp_path / "target")


def test_writers_of_the_same_blob_help_or_at_least_do_not_hinder_one_another(rgw_endpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(11 * MIB))
    key = blob_key(file_digest(path))
    stores = [through(rgw_endpoint, "")]
    stores += [S3Store.from_url(stores[0].url) for _ in range(3)]
    start = threading.Barrier(4)

    def write(store: S3Store) -> None:
        start.wait()
        store.put_file(path, key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, stores))
    stores[0].get_file(key, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == path.read_bytes()


def test_an_object_overwritten_while_it_is_read_is_not_mixed(rgw_endpoint: str, tmp_path: Path) -> None:
    """The second range is asked for the version the first one saw; another version is an error, never half of each."""
    store = through(rgw_endpoint, "")
    (tmp_path / "old").write_bytes(bytes(11 * MIB))
    (tmp_path / "new").write_bytes(b"\1" * (11 * MIB))
    store.put_file(tmp_path / "old", "name")
    replaced = []

    def replace(params: dict[str, str], **_: object) -> None:
        if params.get("IfMatch") and not replaced:
            replaced.append(True)
            S3Store.from_url(store.url).put_file(tmp_path / "new", "name")

    store.client.meta.events.register("provide-client-params.s3.GetObject", replace)
    with pytest.raises(StoreError):
        store.get_file("name", tmp_path / "target")
    assert replaced


def test_an_object_overwritten_between_two_halves_of_a_range_is_not_mixed(moto_endpoint: str, tmp_path: Path) -> None:
    with proxy(moto_endpoint, share=0.0) as server:
        store = through(server.url, "")
        straight = S3Store.from_url(store.url.replace(server.url, moto_endpoint))
        straight.put_bytes(bytes(1000), "name")
        Scripted(server, "cut the body")

        def replace(params: dict[str, str], **_: object) -> None:
            if not params["Range"].startswith("bytes=0-"):
                straight.put_bytes(b"\1" * 1000, "name")

        store.client.meta.events.register("provide-client-params.s3.GetObject", replace)
        with pytest.raises(StoreError, match="PreconditionFailed"):
            store.get_file("name", tmp_path / "target")


@pytest.mark.parametrize("kind", ["moto", "rgw"])
def test_a_blob_that_is_refreshed_in_parts_of_another_size_is_read_on(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    endpoint = request.getfixturevalue(f"{kind}_endpoint")
    (tmp_path / "source").write_bytes(os.urandom(17 * MIB))
    key = blob_key(file_digest(tmp_path / "source"))
    store = through(endpoint, "")
    other = S3Store.from_url(store.url.replace("part_mib=5", "part_mib=6"))
    store.put_file(tmp_path / "source", key)
    refreshed = []

    def refresh(params: dict[str, str], **_: object) -> None:
        if not params["Range"].startswith("bytes=0-") and not refreshed:
            refreshed.append(store.client.head_object(**store.name(key))["ETag"])
            other.put_file(tmp_path / "source", key)
            refreshed.append(store.client.head_object(**store.name(key))["ETag"])

    store.client.meta.events.register("provide-client-params.s3.GetObject", refresh)
    store.get_file(key, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert len(set(refreshed)) == 2


def unfinished_upload(store: S3Store, key: str, parts: list[bytes]) -> dict[str, str]:
    """An upload that has sent these parts and was not ended."""
    name = store.name(key)
    name["UploadId"] = store.client.create_multipart_upload(**name, ChecksumAlgorithm="CRC32C")["UploadId"]
    for number, data in enumerate(parts, 1):
        store.client.upload_part(**name, PartNumber=number, Body=data, **checksum(data))
    return name


def test_an_upload_in_parts_of_another_size_is_left_to_its_owner(rgw_endpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(17 * MIB))
    key = blob_key(file_digest(path))
    store = through(rgw_endpoint, "")
    theirs = unfinished_upload(store, key, [path.read_bytes()[: 6 * MIB]])
    store.put_file(path, key)
    store.get_file(key, tmp_path / "target")
    assert [part["Size"] for part in store.client.list_parts(**theirs)["Parts"]] == [6 * MIB]
    assert len(list(store.unfinished(key))) == 1


def test_parts_replaced_by_another_writer_begin_the_upload_anew(rgw_endpoint: str, tmp_path: Path) -> None:
    """It joined before any part was there, cut the file otherwise, and was killed before it ended the upload."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(17 * MIB))
    key = blob_key(file_digest(path))
    store, replaced = through(rgw_endpoint, ""), []

    def replace(params: dict[str, str], **_: object) -> None:
        if not replaced:
            replaced.append(params["UploadId"])
            name = store.name(key) | {"UploadId": params["UploadId"]}
            data = path.read_bytes()[: 6 * MIB]
            store.client.upload_part(**name, PartNumber=1, Body=data, **checksum(data))

    store.client.meta.events.register("provide-client-params.s3.CompleteMultipartUpload", replace)
    store.put_file(path, key)
    store.get_file(key, tmp_path / "target")
    assert replaced and list(store.unfinished(key)) == []


def test_an_upload_that_others_aborted_is_not_taken_for_done(rgw_endpoint: str, tmp_path: Path) -> None:
    """An object of the same length was there before: it is not what was sent."""
    store = through(rgw_endpoint, "")
    (tmp_path / "old").write_bytes(bytes(11 * MIB))
    (tmp_path / "new").write_bytes(os.urandom(11 * MIB))
    store.put_file(tmp_path / "old", "name")
    aborted = []

    def abort(params: dict[str, str], **_: object) -> None:
        if not aborted:
            aborted.append(params["UploadId"])
            store.client.abort_multipart_upload(**store.name("name"), UploadId=params["UploadId"])

    store.client.meta.events.register("provide-client-params.s3.UploadPart", abort)
    store.put_file(tmp_path / "new", "name")
    store.get_file("name", tmp_path / "target")
    assert aborted and (tmp_path / "target").read_bytes() == (tmp_path / "new").read_bytes()


@pytest.mark.parametrize("kind", ["moto", "rgw"])
def test_more_unfinished_uploads_than_one_page_holds(kind: str, request: pytest.FixtureRequest) -> None:
    store = through(request.getfixturevalue(f"{kind}_endpoint"), "")
    begun = {unfinished_upload(store, f"blobs/{number}", [])["UploadId"] for number in range(5)}
    store.page = 2
    assert {upload["UploadId"] for upload in store.unfinished()} == begun
    for upload in list(store.unfinished()):
        store.abort(upload)
    assert list(store.unfinished()) == []

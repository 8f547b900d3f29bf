"""What every object store must do, the same for a folder, moto's server and a real S3 server."""

import os
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from components.common.errors import ArtifactNotFound, DigestMismatch, SettingsError, StoreError
from components.common.integrity import blob_key, crc32c
from components.common.manifest import file_digest
from components.common.s3_store import S3Store
from components.common.store import Store, open_store

MIB = 1 << 20


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 5 * MIB + 1, 17 * MIB + 3])
def test_a_file_comes_back_byte_for_byte(store: Store, tmp_path: Path, size: int) -> None:
    source = random_file(tmp_path / "source", size)
    store.put_file(source, "some/folder/file.bin")
    store.get_file("some/folder/file.bin", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    found = store.stat("some/folder/file.bin")
    assert found and found.size == size
    assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=5)


def test_a_file_replaces_what_was_there(store: Store, tmp_path: Path) -> None:
    store.put_file(random_file(tmp_path / "first", 6 * MIB), "name")
    store.put_file(random_file(tmp_path / "second", 100), "name")
    assert store.get_bytes("name") == (tmp_path / "second").read_bytes()


def test_a_longer_file_in_the_way_of_a_download_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    store.put_bytes(b"short", "name")
    target = random_file(tmp_path / "target", 1000)
    store.get_file("name", target)
    assert target.read_bytes() == b"short"


def test_what_is_not_there_is_said_so(store: Store, tmp_path: Path) -> None:
    assert store.stat("nothing") is None
    with pytest.raises(ArtifactNotFound, match="no object nothing"):
        store.get_bytes("nothing")
    with pytest.raises(ArtifactNotFound, match="no object nothing"):
        store.get_file("nothing", tmp_path / "target")
    store.delete("nothing")


def test_names_are_listed_in_order_and_by_prefix(store: Store) -> None:
    keys = ["a-b", "a/b", "a/b-c", "a/b/c", "ab", "b/ü"]
    for key in keys[:1] + keys[2:]:
        store.put_bytes(key.encode(), key)
    assert [found.key for found in store.list("")] == ["a-b", "a/b-c", "a/b/c", "ab", "b/ü"]
    assert [found.key for found in store.list("a/b")] == ["a/b-c", "a/b/c"]
    assert [found.size for found in store.list("a/b-")] == [5]
    assert list(store.list("nothing/")) == []
    store.delete("a/b/c")
    assert [found.key for found in store.list("a/")] == ["a/b-c"]


def test_more_names_than_one_page_holds(store: Store) -> None:
    store.page = 10  # type: ignore[attr-defined]
    for number in range(31):
        store.put_bytes(b"", f"page/{number:04d}")
    assert [found.key for found in store.list("page/")] == [f"page/{number:04d}" for number in range(31)]


def test_one_of_many_racing_writers_wins(store: Store) -> None:
    for turn in range(10):
        key = f"race/{turn}"
        with ThreadPoolExecutor(8) as pool:
            won = list(
                pool.map(lambda n, key=key: store.put_bytes(f"writer {n}".encode(), key, if_absent=True), range(8))
            )
        assert sum(won) == 1
        assert store.get_bytes(key) == f"writer {won.index(True)}".encode()
    assert store.put_bytes(b"later", "race/0", if_absent=True) is False


def test_one_of_many_writers_replaces_what_it_has_seen(store: Store) -> None:
    assert store.put_bytes(b"new", "pointer", instead_of=b"old") is False and store.stat("pointer") is None
    store.put_bytes(b"0", "pointer")
    for turn in range(10):
        with ThreadPoolExecutor(8) as pool:
            texts = [f"{turn} by {number}".encode() for number in range(8)]
            before = store.get_bytes("pointer")
            won = list(pool.map(lambda text, before=before: store.put_bytes(text, "pointer", instead_of=before), texts))
        assert sum(won) == 1
        assert store.get_bytes("pointer") == texts[won.index(True)]
    assert store.put_bytes(b"late", "pointer", instead_of=b"0") is False


def test_a_name_of_any_bytes_is_replaced_when_not_guarded(store: Store) -> None:
    assert store.put_bytes(b"one", "name") is True
    assert store.put_bytes(b"two", "name") is True
    assert store.get_bytes("name") == b"two"


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/./b", "a\\b", "a\0b", "a\nb", "a/", "x" * 1025]
)
def test_keys_that_could_leave_the_root_are_refused(store: Store, tmp_path: Path, key: str) -> None:
    with pytest.raises(StoreError, match="not an object key"):
        store.put_bytes(b"x", key)
    with pytest.raises(StoreError, match="not an object key"):
        store.get_file(key, tmp_path / "target")
    with pytest.raises(StoreError, match="not an object key"):
        store.delete(key)


def test_a_prefix_cannot_leave_the_root(store: Store) -> None:
    with pytest.raises(StoreError, match="not an object key"):
        list(store.list("../"))


@pytest.mark.parametrize("size", [1000, 11 * MIB])
def test_a_changed_blob_is_refused_and_not_left_behind(store: Store, tmp_path: Path, size: int) -> None:
    source = random_file(tmp_path / "source", size)
    key = blob_key(file_digest(source))
    changed = bytearray(source.read_bytes())
    changed[size // 2] ^= 1
    (tmp_path / "changed").write_bytes(changed)
    store.put_file(tmp_path / "changed", key)
    with pytest.raises(DigestMismatch, match="was changed or cut"):
        store.get_file(key, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    with pytest.raises(DigestMismatch, match="was changed or cut"):
        store.get_bytes(key)


def test_what_others_wrote_without_a_digest_is_readable(rgw_store: Store, tmp_path: Path) -> None:
    assert isinstance(rgw_store, S3Store)
    rgw_store.client.put_object(Body=b"plain", **rgw_store.name("plain"))
    assert rgw_store.get_bytes("plain") == b"plain"
    rgw_store.get_file("plain", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"plain"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/folder", "want file:///folder or s3://bucket/prefix"),
        ("s3:///prefix", "want s3://bucket/prefix"),
        ("s3://key:secret@bucket", "without credentials"),
        ("s3://bucket?endpiont=http://x", "endpiont is no option of an s3 URL; want endpoint"),
        ("s3://bucket?connections=many", "connections wants a number, got 'many'"),
        ("s3://bucket?profile=no-such-profile", "no-such-profile"),
    ],
)
def test_a_wrong_url_says_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        open_store(url)


def test_a_url_has_one_spelling() -> None:
    url = "s3://bucket/some/prefix/?region=eu-west-1&endpoint=http%3A%2F%2Fhost%3A9000&part_mib=24"
    assert open_store(url).url == "s3://bucket/some/prefix?endpoint=http://host:9000&region=eu-west-1"


def test_crc32c_is_the_published_one() -> None:
    """Check value of CRC-32C (RFC 3720, appendix B.4 uses the same polynomial): 0xE3069283 of the digits 1 to 9."""
    assert crc32c(b"123456789") == b64encode(bytes.fromhex("e3069283")).decode()


def test_a_damaged_part_of_an_unfinished_rollout_is_drawn_again(store: Store, tmp_path: Path) -> None:
    from components.rollout.plan import Group
    from components.rollout.resume import Sample, Saved
    from components.rollout.sampler import SampleRequest, Sampling

    sampling = Sampling(temperature=1.0, max_tokens=4)
    groups = [Group("train", row, (SampleRequest(f"p{row}", 0, (1,), 7, sampling),)) for row in range(2)]
    sample = Sample(np.array([1, 2], np.int32), np.array([-1.0, -2.0], np.float32), "stop")
    saved = Saved(store, "partial/job/", "policy", tmp_path)
    for group in groups:
        saved.save([(group, [sample])])
    first, second = (stat.key for stat in store.list("partial/"))
    damaged = bytearray(store.get_bytes(first))
    damaged[len(damaged) // 2] ^= 1
    if isinstance(store, S3Store):  # its digest stands in the object's metadata, which damage leaves alone
        metadata = store.client.head_object(**store.name(first))["Metadata"]
        store.client.put_object(Body=bytes(damaged), **store.name(first), Metadata=metadata)
    else:
        store.put_bytes(bytes(damaged), first)
    assert list(Saved(store, "partial/job/", "policy", tmp_path).load(groups)) == [("train", "p1")]
    assert [stat.key for stat in store.list("partial/")] == [second]

"""The node cache: shared, bounded, never in the way of who uses it, and never trusted unchecked."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from components.common import delta
from components.common.cache import NodeCache, node_cache
from components.common.errors import SettingsError, StoreError
from components.common.manifest import file_digest
from tests.common.test_delta_codec import write

KIB = 1024


def digest_of(data: bytes) -> str:
    return "blake3:" + blake3(data).hexdigest()


def maker(data: bytes, calls: list[int] | None = None, pause: float = 0) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        if calls is not None:
            calls.append(1)
        path.write_bytes(data[: len(data) // 2])
        time.sleep(pause)
        path.write_bytes(data)

    return make


def refuse(path: Path) -> None:
    raise AssertionError(f"fetched again: {path}")


def put(cache: NodeCache, data: bytes, target: Path | None = None) -> Path:
    found = cache.get(digest_of(data), len(data), maker(data))
    assert found and found.read_bytes() == data
    return found


def test_many_who_want_the_same_blob_fetch_it_once(tmp_path: Path) -> None:
    data, calls = os.urandom(100 * KIB), []
    caches = [NodeCache(tmp_path, 2**20) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda cache: cache.get(digest_of(data), len(data), maker(data, calls, 0.1)), caches))
    assert len(calls) == 1
    assert {path.read_bytes() for path in paths if path} == {data}
    assert os.listdir(tmp_path / "incoming") == []


def _use(root: Path, index: int, count: int, made: "multiprocessing.Queue[int]") -> None:
    """Fetches blobs in turn until it had `count`, as a pod would, in a cache too small for all."""
    cache = NodeCache(root, 300 * KIB)
    turn = index
    while count:
        data = bytes([turn % 8]) * (100 * KIB)
        found = cache.get(digest_of(data), len(data), maker(data))
        if found:
            made.put(found.read_bytes() == data)
            count -= 1
        cache.release()
        turn += 1


def test_pods_that_evict_one_another_read_whole_blobs_only(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    made: multiprocessing.Queue[int] = context.Queue()
    pods = [context.Process(target=_use, args=(tmp_path, index, 250, made)) for index in range(4)]
    for pod in pods:
        pod.start()
    results = []
    while any(pod.is_alive() for pod in pods) or not made.empty():
        while not made.empty():
            results.append(made.get())
        time.sleep(0.01)
    assert [pod.exitcode for pod in pods] == [0] * 4
    assert all(results)
    assert len(results) == 4 * 250
    cache = NodeCache(tmp_path, 300 * KIB)
    assert sum(entry.size for entry in cache.entries()) <= 300 * KIB


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 300 * KIB)
    first, second, third, fourth = (os.urandom(100 * KIB) for _ in range(4))
    for data in (first, second, third):
        put(cache, data)
    assert cache.get(digest_of(first), len(first), refuse)  # used again: the second is the oldest now
    cache.release()
    put(cache, fourth)
    assert [cache.has(digest_of(data)) for data in (first, second, third, fourth)] == [True, False, True, True]


def test_what_is_in_use_is_never_evicted(tmp_path: Path) -> None:
    data, others = os.urandom(100 * KIB), [os.urandom(100 * KIB) for _ in range(4)]
    holder = NodeCache(tmp_path / "cache", 200 * KIB)
    put(holder, data)
    pod = NodeCache(tmp_path / "cache", 200 * KIB)
    for other in others:
        put(pod, other)
        pod.release()
    assert holder.has(digest_of(data))
    assert not any(pod.has(digest_of(other)) for other in others[:-1])
    holder.release()
    put(pod, others[0])
    pod.release()
    put(pod, others[1])
    assert not holder.has(digest_of(data))


def test_a_link_in_a_work_folder_counts_as_use(tmp_path: Path) -> None:
    data, others = os.urandom(100 * KIB), [os.urandom(100 * KIB) for _ in range(3)]
    cache = NodeCache(tmp_path / "cache", 200 * KIB)
    cache.place(digest_of(data), len(data), maker(data), tmp_path / "target")
    cache.release()
    for other in others:
        put(cache, other)
        cache.release()
    assert cache.has(digest_of(data))
    (tmp_path / "target").unlink()
    put(cache, others[0])
    cache.release()
    put(cache, others[1])
    assert not cache.has(digest_of(data))


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system to link across")
def test_across_file_systems_a_symbolic_link_and_a_lease_do(tmp_path: Path) -> None:
    import tempfile

    data, others = os.urandom(100 * KIB), [os.urandom(100 * KIB) for _ in range(3)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        assert os.stat(shm).st_dev != os.stat(tmp_path).st_dev
        cache = NodeCache(tmp_path / "cache", 200 * KIB)
        target = Path(shm) / "target"
        cache.place(digest_of(data), len(data), maker(data), target)
        assert target.is_symlink()
        pod = NodeCache(tmp_path / "cache", 200 * KIB)
        for other in others:
            put(pod, other)
            pod.release()
        assert target.read_bytes() == data


def test_a_blob_larger_than_the_cache_goes_past_it(tmp_path: Path) -> None:
    data = os.urandom(100 * KIB)
    cache = NodeCache(tmp_path / "cache", 50 * KIB)
    cache.place(digest_of(data), len(data), maker(data), tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert cache.entries() == []


def test_a_changed_blob_is_fetched_again(tmp_path: Path) -> None:
    data = os.urandom(100 * KIB)
    cache = NodeCache(tmp_path, 2**20)
    path = put(cache, data)
    assert path.stat().st_mode & 0o777 == 0o444
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    calls: list[int] = []
    found = cache.get(digest_of(data), len(data), maker(data, calls))
    assert found and found.read_bytes() == data
    assert len(calls) == 1


def _stall(root: Path, data: bytes) -> None:
    NodeCache(root, 2**20).get(digest_of(data), len(data), maker(data, pause=60))


def test_a_killed_writer_leaves_nothing_locked_and_nothing_half(tmp_path: Path) -> None:
    data = os.urandom(100 * KIB)
    process = multiprocessing.get_context("fork").Process(target=_stall, args=(tmp_path, data))
    process.start()
    while not (tmp_path / "incoming").is_dir() or not os.listdir(tmp_path / "incoming"):
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache = NodeCache(tmp_path, 2**20)
    assert not cache.has(digest_of(data))
    put(cache, data)
    assert os.listdir(tmp_path / "incoming") == []


def test_a_folder_of_patches_that_its_writer_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another pod lists `incoming`, then this one's fetch ends, and only then the other looks at the folder."""
    cache = NodeCache(tmp_path, 2**20)
    (tmp_path / "incoming" / ".patch-done").mkdir()
    (tmp_path / "incoming" / ".patch-dead").mkdir()
    os.utime(tmp_path / "incoming" / ".patch-dead", (0, 0))
    real = Path.glob

    def listed(self: Path, pattern: str) -> list[Path]:
        found = sorted(real(self, pattern), reverse=True)
        (tmp_path / "incoming" / ".patch-done").rmdir()
        return found

    monkeypatch.setattr(Path, "glob", listed)
    cache._sweep()
    assert os.listdir(tmp_path / "incoming") == []


def test_making_room_leaves_a_chain_alone_that_is_being_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch that changes the file's layout needs a file in between; it must lie where no other pod sweeps."""
    files = [
        write(tmp_path / "a", {"w": ("BF16", [1000], bytes(2000))}),
        write(tmp_path / "b", {"w": ("BF16", [1000], b"\1" * 2000)}),
        write(tmp_path / "c", {"w": ("BF16", [1000], b"\2" * 2000), "v": ("BF16", [10], bytes(20))}),
    ]
    digests = [file_digest(file) for file in files]
    for number in (0, 1):
        delta.encode(
            files[number], files[number + 1], tmp_path / f"patch{number}",
            base_digest=digests[number], new_digest=digests[number + 1],
        )  # fmt: skip
    cache, applied, real = NodeCache(tmp_path / "cache", 2**20), [], delta._apply

    def apply(*arguments: Any) -> None:
        real(*arguments)
        applied.append(1)
        NodeCache(tmp_path / "cache", 2**20)._sweep()

    monkeypatch.setattr(delta, "_apply", apply)

    def make(path: Path) -> None:
        patches = [tmp_path / "patch0", tmp_path / "patch1"]
        delta.decode(files[0], patches, path, base_digest=digests[0], new_digest=digests[2])

    found = cache.get(digests[2], files[2].stat().st_size, make)
    assert found and found.read_bytes() == files[2].read_bytes()
    assert len(applied) == 2


def test_a_failed_fetch_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 2**20)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        cache.get(digest_of(b"whole"), 5, fail)
    assert os.listdir(tmp_path / "incoming") == [] and cache.entries() == []
    put(cache, b"whole")


def test_the_environment_says_where_and_how_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("GRPO_CACHE_GIB", "0.5")
    cache = node_cache()
    assert cache and (cache.root, cache.max_bytes) == (tmp_path / "here", 2**29)
    monkeypatch.setenv("GRPO_CACHE_DIR", "off")
    assert node_cache() is None
    monkeypatch.setenv("GRPO_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GRPO_CACHE_GIB", "plenty")
    with pytest.raises(SettingsError, match="GRPO_CACHE_GIB wants a number, got 'plenty'"):
        node_cache()


def test_a_pod_without_a_writable_home_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for name in ("GRPO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert node_cache() is None
    monkeypatch.setenv("GRPO_CACHE_DIR", str(tmp_path / "file"))  # asked for by name: then it must work
    with pytest.raises(StoreError, match=r"make the cache .*set GRPO_CACHE_DIR to another folder, or to off"):
        node_cache()

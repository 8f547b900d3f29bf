"""Policies through the store and back: patches, chains, the node cache, and what is refused."""

import json
import os
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.common import artifacts
from components.common.cache import NodeCache
from components.common.errors import ArtifactError, ArtifactNotFound, DigestMismatch
from components.common.manifest import File, Manifest, Producer, content_digest, file_digest
from components.common.patched import DeltaSettings, upload_policy
from components.common.settings import RunContext
from components.common.store import FileStore, Store, open_store
from components.publish.export import export

CONTEXT = RunContext(fine_tune="tune", run="run-0001", store="", seed=0, iterations=8)
VALUES = 200_000


def save_policy(folder: Path, weights: np.ndarray) -> dict[str, Path]:
    """A policy folder: one weight file of bf16 bits and a small file beside it."""
    folder.mkdir(parents=True)
    head = json.dumps({"w": {"dtype": "BF16", "shape": [VALUES], "data_offsets": [0, 2 * VALUES]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + weights.tobytes())
    (folder / "config.json").write_text("{}")
    return {path.name: path for path in folder.iterdir()}


def producer(key: str) -> Producer:
    return Producer(stage="update", key=key, settings_digest="s", code_version="1")


class Chain:
    """A fine-tune of policies, each one training step after the one before."""

    def __init__(self, store: Store, folder: Path, settings: DeltaSettings | None = None, share: float = 0.01) -> None:
        self.store, self.folder, self.settings, self.share = store, folder, settings or DeltaSettings(), share
        self.random = np.random.default_rng(0)
        self.weights = self.random.integers(0, 2**16, VALUES, dtype=np.uint16)
        self.bytes = [self.weights]
        files = save_policy(folder / "0", self.weights)
        self.policies = [self._publish(files=files)]
        self.figures: list[dict[str, float]] = [{}]

    def _publish(self, **what: Any) -> Manifest:
        number = len(self.bytes) - 1
        return artifacts.publish(
            self.store, CONTEXT, name="policy", kind="policy", producer=producer(str(number)), iteration=number,
            **({"files": {}} | what),
        )  # fmt: skip

    def step(self) -> Manifest:
        """One more policy, published as the update stage does."""
        where = self.random.random(VALUES) < self.share
        self.weights = self.weights + where.astype(np.uint16)
        self.bytes.append(self.weights)
        files = save_policy(self.folder / str(len(self.bytes) - 1), self.weights)
        base = self.policies[-1]
        new = {"model.safetensors": files["model.safetensors"]}
        base_dir = self.folder / str(len(self.bytes) - 2)
        uploaded, figures = upload_policy(self.store, new, base, base_dir, self.settings)
        kept = [file for file in base.files if file.name == "config.json"]
        self.policies.append(self._publish(reuse=[*uploaded, *kept]))
        self.figures.append(figures)
        return self.policies[-1]

    def check(self, number: int, target: Path, cache: NodeCache | None = None) -> None:
        """Fetches a policy and compares it with what was trained, byte for byte."""
        artifacts.fetch(self.store, self.policies[number], target, cache=cache)
        assert (target / "model.safetensors").read_bytes()[-2 * VALUES :] == self.bytes[number].tobytes()
        assert (target / "config.json").read_text() == "{}"


def weights_of(manifest: Manifest) -> File:
    return next(file for file in manifest.files if file.name == "model.safetensors")


def test_a_chain_of_policies_is_stored_as_patches_and_comes_back(store: Store, tmp_path: Path) -> None:
    chain = Chain(store, tmp_path / "trained")
    for _ in range(4):
        chain.step()
    for number in range(5):
        patch = weights_of(chain.policies[number]).patch
        assert (len(patch.steps) if patch else 0) == number
        chain.check(number, tmp_path / f"fetched{number}")
    full = weights_of(chain.policies[0])
    for figures in chain.figures[1:]:
        assert figures["artifact/changed_fraction"] == pytest.approx(0.01, rel=0.1)
        assert figures["artifact/policy_bytes"] * figures["artifact/delta_ratio"] == pytest.approx(full.size)
        assert figures["artifact/delta_ratio"] > 90
    stored = sum(stat.size for stat in store.list("blobs/"))
    assert stored == full.size + 2 + sum(figures["artifact/policy_bytes"] for figures in chain.figures[1:])


def test_a_full_copy_bounds_the_chain(tmp_path: Path) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained", DeltaSettings(max_chain=2))
    lengths = []
    for _ in range(7):
        patch = weights_of(chain.step()).patch
        lengths.append(len(patch.steps) if patch else 0)
    assert lengths == [1, 2, 0, 1, 2, 0, 1]
    chain.check(7, tmp_path / "fetched")


def test_patches_together_stay_below_their_share_of_a_full_copy(tmp_path: Path) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained", DeltaSettings(max_share=0.1), share=0.1)
    for _ in range(6):
        file = weights_of(chain.step())
        steps = file.patch.steps if file.patch else ()
        assert sum(step.size for step in steps) <= 0.1 * file.size
    assert any(weights_of(policy).patch is None for policy in chain.policies[1:])
    assert any(weights_of(policy).patch for policy in chain.policies[1:])


def test_a_policy_that_changed_too_much_is_stored_whole(tmp_path: Path) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained", DeltaSettings(max_share=0.05), share=0.5)
    assert weights_of(chain.step()).patch is None
    assert chain.figures[1]["artifact/delta_ratio"] == 1
    chain.check(1, tmp_path / "fetched")


def test_an_unchanged_policy_takes_no_byte(tmp_path: Path) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained", share=0.0)
    chain.step()
    assert chain.figures[1]["artifact/policy_bytes"] == 0
    assert chain.policies[1].digest == chain.policies[0].digest


def test_a_base_that_was_changed_on_disk_is_not_patched_against(tmp_path: Path) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained")
    base = tmp_path / "trained" / "0" / "model.safetensors"
    base.write_bytes(base.read_bytes()[:-2] + b"xx")
    assert weights_of(chain.step()).patch is None
    chain.check(1, tmp_path / "fetched")


def test_a_patched_policy_has_the_digest_of_a_whole_one(tmp_path: Path) -> None:
    patched = Chain(FileStore(tmp_path / "a"), tmp_path / "one")
    whole = Chain(FileStore(tmp_path / "b"), tmp_path / "two", DeltaSettings(enabled=False))
    assert patched.step().digest == whole.step().digest
    assert weights_of(patched.policies[1]).patch and weights_of(whole.policies[1]).patch is None


def test_values_of_unchanged_files_count_as_unchanged(tmp_path: Path) -> None:
    """Two weight files of 200,000 values; 2,000 of the first change: 2,000 of 400,000."""
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained")
    before, after = np.zeros(VALUES, np.uint16), np.zeros(VALUES, np.uint16)
    after[::100] = 1
    files = {}
    for folder, weights in ((tmp_path / "before", before), (tmp_path / "after", after)):
        first = save_policy(folder, weights)["model.safetensors"]
        second = save_policy(folder / "other", before)["model.safetensors"].rename(folder / "second.safetensors")
        files[folder.name] = {path.name: path for path in (first, second)}
    chain.bytes.append(before)
    base = chain._publish(files=files["before"])
    _, figures = upload_policy(chain.store, files["after"], base, tmp_path / "before", DeltaSettings())
    assert figures["artifact/changed_fraction"] == 2_000 / 400_000


@pytest.mark.parametrize("cached", [False, True])
def test_a_patch_that_makes_another_file_than_the_manifest_says_is_refused(tmp_path: Path, cached: bool) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained")
    honest = chain.step()
    file = weights_of(honest)
    assert file.patch
    wrong = "blake3:" + "ab" * 32
    step = file.patch.steps[0].model_copy(update={"result": wrong})
    lie = file.model_copy(update={"digest": wrong, "patch": file.patch.model_copy(update={"steps": (step,)})})
    altered = honest.model_copy(update={"files": (lie,), "digest": content_digest("policy", [lie])})
    manifest = Manifest.parse(altered.dump(), where="outside")  # consistent in itself
    cache = NodeCache(tmp_path / "cache", 2**30) if cached else None
    with pytest.raises(DigestMismatch, match=f"want {wrong}"):
        artifacts.fetch(chain.store, manifest, tmp_path / "fetched", cache=cache)
    assert list((tmp_path / "fetched").iterdir()) == []


@pytest.mark.parametrize("which", ["full copy", "patch"])
def test_damage_anywhere_in_a_chain_is_found(tmp_path: Path, which: str) -> None:
    store = FileStore(tmp_path / "store")
    chain = Chain(store, tmp_path / "trained")
    chain.step()
    file = weights_of(chain.step())
    assert file.patch
    place = store.path(file.key if which == "full copy" else file.patch.steps[0].key)
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    with pytest.raises(DigestMismatch):
        artifacts.fetch(store, chain.policies[2], tmp_path / "fetched")
    assert not (tmp_path / "fetched" / "model.safetensors").exists()


def test_a_policy_whose_full_copy_is_gone_is_said_so(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    chain = Chain(store, tmp_path / "trained")
    store.delete(weights_of(chain.step()).key)
    with pytest.raises(ArtifactNotFound):
        artifacts.fetch(store, chain.policies[1], tmp_path / "fetched")


def test_a_manifest_does_not_promise_what_is_gone(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    chain = Chain(store, tmp_path / "trained")
    store.delete(weights_of(chain.policies[0]).key)
    with pytest.raises(ArtifactNotFound, match="is gone, collected or deleted"):
        artifacts.publish(
            store,
            CONTEXT,
            name="scored",
            kind="scored",
            files={},
            reuse=chain.policies[0].files,
            producer=producer("x"),
        )
    assert store.stat("manifests/tune/run-0001/run/scored.json") is None


class Counting(FileStore):
    """Counts what is read from it, and counts as remote, so that the cache is used."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()

    def get_file(self, key: str, path: Path) -> None:
        self.reads[key] += 1
        super().get_file(key, path)


def test_a_second_fetch_on_the_node_moves_no_byte(tmp_path: Path) -> None:
    store, cache = Counting(tmp_path / "store"), NodeCache(tmp_path / "cache", 2**30)
    chain = Chain(store, tmp_path / "trained")
    chain.step(), chain.step()
    chain.check(2, tmp_path / "first", cache)
    assert set(store.reads.values()) == {1}
    assert len(store.reads) == 4  # full copy, two patches, config.json
    chain.check(2, tmp_path / "second", cache)
    assert store.reads.total() == 4


def test_the_next_policy_needs_its_patch_alone(tmp_path: Path) -> None:
    store, cache = Counting(tmp_path / "store"), NodeCache(tmp_path / "cache", 2**30)
    chain = Chain(store, tmp_path / "trained")
    chain.step()
    chain.check(1, tmp_path / "first", cache)
    store.reads.clear()
    patch = weights_of(chain.step()).patch
    assert patch
    chain.check(2, tmp_path / "second", cache)
    assert store.reads == Counter([patch.steps[1].key])


def test_a_cached_base_that_was_changed_is_fetched_again(tmp_path: Path) -> None:
    store, cache = Counting(tmp_path / "store"), NodeCache(tmp_path / "cache", 2**30)
    chain = Chain(store, tmp_path / "trained")
    chain.check(0, tmp_path / "first", cache)
    cached = cache.path(weights_of(chain.policies[0]).digest)
    cached.chmod(0o644)
    cached.write_bytes(b"x" + cached.read_bytes()[1:])
    chain.step()
    chain.check(1, tmp_path / "second", cache)
    assert store.reads[weights_of(chain.policies[0]).key] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../../etc/passwd"},
        {"key": "blobs/blake3/" + "0" * 64},
        {"name": "../escape"},
        {"name": "/etc/passwd"},
        {"name": "a/../../b"},
        {"name": ".hidden"},
        {"digest": "md5:abc"},
        {"size": -1},
    ],
)
def test_a_manifest_from_outside_cannot_name_other_places(tmp_path: Path, change: dict[str, Any]) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained")
    values = json.loads(chain.policies[0].dump())
    values["files"][1] |= change
    with pytest.raises(ArtifactError, match="is not a manifest of schema"):
        Manifest.parse(json.dumps(values).encode(), where="outside")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained")
    values = json.loads(chain.policies[0].dump())
    values["files"][1]["name"] = values["files"][0]["name"]
    with pytest.raises(ArtifactError, match="two files have the same name"):
        Manifest.parse(json.dumps(values).encode(), where="outside")


@pytest.mark.parametrize(
    "change", [{"key": "blobs/blake3/" + "0" * 64}, {"result": "blake3:" + "0" * 64}, {"size": -1}]
)
def test_a_patch_from_outside_cannot_name_other_places(tmp_path: Path, change: dict[str, Any]) -> None:
    chain = Chain(FileStore(tmp_path / "store"), tmp_path / "trained")
    values = json.loads(chain.step().dump())
    values["files"][1]["patch"]["steps"][0] |= change
    with pytest.raises(ArtifactError, match="is not a manifest of schema"):
        Manifest.parse(json.dumps(values).encode(), where="outside")


def test_files_land_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    """The target's name appears by a rename; what was under it before stays until then."""
    chain = Chain(store, tmp_path / "trained")
    target = tmp_path / "fetched"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    store.delete(weights_of(chain.policies[0]).key)
    with pytest.raises(ArtifactNotFound):
        artifacts.fetch(store, chain.policies[0], target)
    assert (target / "model.safetensors").read_text() == "old"
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


def test_only_the_names_asked_for_are_fetched(store: Store, tmp_path: Path) -> None:
    chain = Chain(store, tmp_path / "trained")
    artifacts.fetch(store, chain.policies[0], tmp_path / "fetched", ["config.json"])
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["config.json"]
    assert file_digest(tmp_path / "fetched" / "config.json") == file_digest(tmp_path / "trained" / "0" / "config.json")


# --- whoever keeps the files ------------------------------------------------------------------------------------------


def no_links(folder: Path) -> None:
    """The files are the folder's own: neither symbolic links nor names of files that lie elsewhere too."""
    for path in folder.iterdir():
        assert not path.is_symlink() and path.stat().st_nlink == 1, path


@pytest.fixture(params=["same file system", "another"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the cache's file system, and one on another: a claim beside an emptyDir."""
    if request.param == "same file system":
        yield tmp_path / "kept"
    elif not os.access("/dev/shm", os.W_OK):
        pytest.skip("no second file system to copy to")
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            assert os.stat(name).st_dev != os.stat(tmp_path).st_dev
            yield Path(name) / "kept"


def test_an_exported_policy_outlives_the_cache(moto_endpoint: str, tmp_path: Path, elsewhere: Path) -> None:
    store = open_store(f"s3://grpo/{uuid.uuid4().hex}?endpoint={moto_endpoint}")
    chain = Chain(store, tmp_path / "trained")
    policy = chain.step()  # stored as a patch
    export(policy, str(elsewhere))
    no_links(elsewhere)
    shutil.rmtree(tmp_path / "node-cache")  # the pod and its emptyDir are gone
    assert (elsewhere / "model.safetensors").read_bytes() == (tmp_path / "trained/1/model.safetensors").read_bytes()


def test_fetched_by_hand_they_outlive_the_cache(moto_endpoint: str, tmp_path: Path, elsewhere: Path) -> None:
    from typer.testing import CliRunner

    from pipeline.cli_artifacts import app

    store = open_store(f"s3://grpo/{uuid.uuid4().hex}?endpoint={moto_endpoint}")
    Chain(store, tmp_path / "trained")
    done = CliRunner().invoke(app, ["fetch", "tune/run-0001/0000/policy", str(elsewhere), "--store", store.url])
    assert done.exit_code == 0, done.output
    no_links(elsewhere)
    shutil.rmtree(tmp_path / "node-cache")
    assert (elsewhere / "model.safetensors").read_bytes() == (tmp_path / "trained/0/model.safetensors").read_bytes()
    (elsewhere / "config.json").write_text("its owner may write to it")


def test_a_file_is_hashed_once_on_its_way_and_once_a_later_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, cache = Counting(tmp_path / "store"), NodeCache(tmp_path / "cache", 2**30)
    chain = Chain(store, tmp_path / "trained")
    second = chain.step()
    hashed: list[int] = []

    def counted(path: Path) -> str:
        hashed.append(path.stat().st_size)
        return file_digest(path)

    monkeypatch.setattr("components.common.manifest.file_digest", counted)
    monkeypatch.setattr("components.common.cache.file_digest", counted)
    size = weights_of(second).size
    artifacts.fetch(store, chain.policies[0], tmp_path / "out", ["model.safetensors"], cache=cache)
    assert hashed.count(size) == 1  # as it arrived
    hashed.clear()
    artifacts.fetch(store, second, tmp_path / "out", ["model.safetensors"], cache=cache)
    assert hashed.count(size) == 2  # the cached base, and what the patch made of it
    hashed.clear()
    artifacts.fetch(store, second, tmp_path / "out", ["model.safetensors"], cache=cache)
    assert hashed.count(size) == 1


def test_a_second_fetch_holds_no_second_descriptor(tmp_path: Path) -> None:
    store, cache = Counting(tmp_path / "store"), NodeCache(tmp_path / "cache", 2**30)
    chain = Chain(store, tmp_path / "trained")
    chain.check(0, tmp_path / "out", cache)
    held = open_below(cache.root)
    for _ in range(5):
        chain.check(0, tmp_path / "out", cache)
    assert open_below(cache.root) == held and len(held) == 2  # the weights and the file beside them


def open_below(folder: Path) -> list[str]:
    """Files below a folder that this process holds open; others come and go, as those of servers of other tests."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(name for name in found if name.startswith(f"{folder}/"))

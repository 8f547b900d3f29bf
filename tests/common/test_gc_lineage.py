"""History, descent and garbage: a small fine-tune written as the stages write it."""

import json
import os
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from components.common import artifacts, gc, lineage, transfer
from components.common.errors import ArtifactError, ArtifactNotFound, SettingsError, StoreError
from components.common.integrity import blob_key, crc32c
from components.common.manifest import Kind, Manifest, Producer, file_digest
from components.common.s3_store import S3Store
from components.common.settings import RunContext
from components.common.store import FileStore, Store, open_store
from tests.common.conftest import store_url

LONG_AGO = timedelta(days=3)


def context(run: str = "run-0001", fine_tune: str = "tune") -> RunContext:
    return RunContext(fine_tune=fine_tune, run=run, store="", seed=0, iterations=8)


class FineTune:
    """Publishes artifacts whose files hold their own names."""

    def __init__(self, store: Store, folder: Path, run: str = "run-0001", fine_tune: str = "tune") -> None:
        self.store, self.folder, self.context = store, folder, context(run, fine_tune)
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, kind: Kind, iteration: int | None, parents: dict[str, Manifest], text: str = "") -> Manifest:
        path = self.folder / f"{kind}-{iteration}"
        path.write_text(text or f"{self.context.fine_tune} {self.context.run} {kind} {iteration}")
        producer = Producer(stage=kind, key=f"{kind} {iteration}", settings_digest="", code_version="1")
        return artifacts.publish(
            self.store, self.context, name=kind, kind=kind, files={"file": path}, producer=producer,
            iteration=iteration, parents={role: manifest.digest for role, manifest in parents.items()},
        )  # fmt: skip

    def train(self, iterations: int) -> dict[str, Manifest]:
        made = {"prompts": self.make("prompts", None, {}), "policy0": self.make("policy", 0, {})}
        for k in range(iterations):
            policy = made[f"policy{k}"]
            rollout = self.make("rollout", k, {"policy": policy, "prompts": made["prompts"]})
            scored = made[f"scored{k}"] = self.make("scored", k, {"completions": rollout})
            made[f"policy{k + 1}"] = self.make("policy", k + 1, {"policy": policy, "scored": scored})
            made[f"evaluation{k}"] = self.make("evaluation", k, {"scored": scored})
        return made


def age(store: FileStore, by: timedelta = LONG_AGO) -> None:
    """Makes everything written so far look older."""
    for path in (store.root / "blobs").rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - by.total_seconds()
            os.utime(path, (then, then))


def blobs(store: Store) -> set[str]:
    return {stat.key for stat in store.list("blobs/")}


def keys(*manifests: Manifest) -> set[str]:
    return {file.key for manifest in manifests for file in manifest.files}


# --- lineage --------------------------------------------------------------------------------------------------------


def test_the_history_is_rebuilt_from_the_store_alone(store: Store, tmp_path: Path) -> None:
    FineTune(store, tmp_path / "files").train(2)
    FineTune(store, tmp_path / "others", fine_tune="tune-b").train(1)
    names = {one.name for one in lineage.history(store, "tune/")}
    assert names == {
        "tune/run-0001/run/prompts", "tune/run-0001/0000/policy", "tune/run-0001/0001/policy",
        "tune/run-0001/0002/policy",
        "tune/run-0001/0000/rollout", "tune/run-0001/0001/rollout", "tune/run-0001/0000/scored",
        "tune/run-0001/0001/scored", "tune/run-0001/0000/evaluation", "tune/run-0001/0001/evaluation",
    }  # fmt: skip
    assert len(lineage.history(store)) == 10 + 6


def test_a_policy_is_traced_back_to_its_prompts(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    FineTune(store, tmp_path / "files").train(2)
    root = lineage.lineage(lineage.history(store), lineage.find(store, "tune/run-0001/0002/policy"))
    seen = [(node.role, node.found.name.split("/", 2)[2] if node.found else None) for node in lineage.walk(root)]
    assert seen == [
        ("", "0002/policy"),
        ("policy", "0001/policy"),
        ("policy", "0000/policy"),
        ("scored", "0000/scored"),
        ("completions", "0000/rollout"),
        ("policy", "0000/policy"),
        ("prompts", "run/prompts"),
        ("scored", "0001/scored"),
        ("completions", "0001/rollout"),
        ("policy", "0001/policy"),
        ("prompts", "run/prompts"),
    ]


def test_an_unchanged_policy_is_not_its_own_ancestor(tmp_path: Path) -> None:
    tune = FineTune(FileStore(tmp_path / "store"), tmp_path / "files")
    first = tune.make("policy", 0, {}, text="same")
    second = tune.make("policy", 1, {"policy": first}, text="same")
    third = tune.make("policy", 2, {"policy": second}, text="same")
    assert first.digest == third.digest
    root = lineage.lineage(lineage.history(tune.store), lineage.find(tune.store, "tune/run-0001/0002/policy"))
    assert [node.found.manifest.iteration for node in lineage.walk(root) if node.found] == [2, 1, 0]


def test_what_the_store_lacks_is_named_by_its_digest(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    made = FineTune(store, tmp_path / "files").train(1)
    store.delete("manifests/tune/run-0001/run/prompts.json")
    root = lineage.lineage(lineage.history(store), lineage.find(store, "tune/run-0001/0001/policy"))
    assert [node.digest for node in lineage.walk(root) if node.found is None] == [made["prompts"].digest]


def test_an_artifact_is_found_by_name_file_and_digest(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    made = FineTune(store, tmp_path / "files").train(1)
    policy = made["policy1"]
    (tmp_path / "manifest.json").write_bytes(policy.dump())
    for reference in (
        "tune/run-0001/0001/policy", "manifests/tune/run-0001/0001/policy.json", policy.digest,
        policy.digest.removeprefix("blake3:")[:10], str(tmp_path / "manifest.json"),
    ):  # fmt: skip
        assert lineage.find(store, reference).manifest == policy
    with pytest.raises(ArtifactNotFound, match="`grpo artifacts ls` names them all"):
        lineage.find(store, "tune/run-0001/0009/policy")


# --- garbage --------------------------------------------------------------------------------------------------------


def test_old_weights_go_and_the_history_stays(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    made = FineTune(store, tmp_path / "files").train(4)
    age(store)
    before = len(lineage.history(store))
    plan = gc.plan(store, keep_last=2)
    assert {stat.key for stat in plan.sweep} == keys(
        *(made[f"policy{k}"] for k in range(3)), *(made[f"scored{k}"] for k in range(3))
    ) | {stat.key for stat in plan.sweep if "rollout" in store.get_bytes(stat.key).decode()}
    assert gc.sweep(store, plan) == plan.bytes > 0
    kept = keys(*(made[name] for name in ("policy3", "policy4", "scored3", "prompts", "evaluation0", "evaluation3")))
    assert kept <= blobs(store)
    assert not keys(made["policy0"], made["policy2"], made["scored2"]) & blobs(store)
    assert len(lineage.history(store)) == before


def test_an_evaluation_that_ends_after_the_next_policy_does_not_outlive_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy 1 is there, then evaluation 0 ends, and the run is stopped: the newest iteration is 1."""
    clock = iter(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute) for minute in range(60))
    monkeypatch.setattr(artifacts, "now", lambda: next(clock))
    store = FileStore(tmp_path / "store")
    tune = FineTune(store, tmp_path / "files")
    made = [tune.make(kind, iteration, {}) for kind, iteration in (("policy", 0), ("scored", 0), ("policy", 1))]
    evaluation = tune.make("evaluation", 0, {})
    assert made[-1].created < evaluation.created
    monkeypatch.undo()
    age(store)
    plan = gc.plan(store, keep_last=1)
    assert {stat.key for stat in plan.sweep} == keys(*made[:2])
    assert plan.live == {"tune/run-0001/0001/policy", "tune/run-0001/0000/evaluation"}


def test_an_old_run_that_is_resumed_works_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute) for minute in range(60))
    monkeypatch.setattr(artifacts, "now", lambda: next(clock))
    store = FileStore(tmp_path / "store")
    first, second = (FineTune(store, tmp_path / name, run=name) for name in ("run-0001", "run-0002"))
    made = [tune.make("policy", number, {}) for tune, number in ((first, 5), (second, 9), (first, 6))]
    monkeypatch.undo()
    age(store)
    assert {stat.key for stat in gc.plan(store, keep_last=1).sweep} == keys(made[0], made[1])
    assert {stat.key for stat in gc.plan(store, keep_last=2).sweep} == keys(made[1])


def test_with_staleness_1_the_last_policy_s_rollout_is_no_iteration_of_its_own(tmp_path: Path) -> None:
    """Policy 3 is the last one; its held-out samples are iteration 4's."""
    store = FileStore(tmp_path / "store")
    tune = FineTune(store, tmp_path / "files")
    made = tune.train(3)
    last = [tune.make(kind, iteration, {}) for iteration in (3, 4) for kind in ("rollout", "scored")]
    age(store)
    swept = {stat.key for stat in gc.plan(store, keep_last=1).sweep}
    assert not keys(made["policy3"], *last) & swept
    assert keys(made["policy2"], made["scored2"]) <= swept
    assert not keys(made["policy2"], made["scored2"]) & {stat.key for stat in gc.plan(store, keep_last=2).sweep}


def test_the_task_of_an_update_that_waits_in_a_queue_stays(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    for key in ("parts/abc/task.json", "parts/abc/0123-00001.json"):
        store.put_bytes(b"{}", key)
    grace = timedelta(seconds=-10)  # everything is old
    gc.sweep(store, gc.plan(store, keep_last=1, grace=grace), grace=grace)
    assert [stat.key for stat in store.list("")] == ["parts/abc/task.json"]


def test_a_dry_plan_changes_nothing(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    FineTune(store, tmp_path / "files").train(4)
    age(store)
    before = blobs(store)
    assert gc.plan(store, keep_last=1).sweep
    assert blobs(store) == before


def test_the_champion_stays_unless_told_otherwise(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    made = FineTune(store, tmp_path / "files").train(4)
    store.put_bytes(
        json.dumps({"manifest": "manifests/tune/run-0001/0001/policy.json"}).encode(), "pointers/tune/champion.json"
    )
    age(store)
    assert not keys(made["policy1"]) & {stat.key for stat in gc.plan(store, keep_last=1).sweep}
    assert keys(made["policy1"]) <= {stat.key for stat in gc.plan(store, keep_last=1, keep_champions=False).sweep}


def test_the_reference_policy_of_a_run_that_goes_on_stays(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    tune = FineTune(store, tmp_path / "files")
    policies = [tune.make("policy", 0, {})]
    for k in range(3):
        policies.append(tune.make("policy", k + 1, {"policy": policies[-1], "reference": policies[0]}))
    age(store)
    assert {stat.key for stat in gc.plan(store, keep_last=1).sweep} == keys(policies[1], policies[2])


def test_what_a_kept_artifact_shares_with_an_old_one_stays(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    tune = FineTune(store, tmp_path / "files")
    shared = tune.make("policy", 0, {}, text="tokenizer")
    tune.make("policy", 1, {}, text="tokenizer")
    age(store)
    assert gc.plan(store, keep_last=1).sweep == []
    assert keys(shared) == blobs(store)


def test_the_newest_iterations_count_over_all_runs_of_a_fine_tune(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    old = FineTune(store, tmp_path / "a", run="run-0001").train(2)
    for stat in list(store.list("manifests/")):  # made a day earlier than the second run's
        values = json.loads(store.get_bytes(stat.key))
        values["created"] = (datetime.fromisoformat(values["created"]) - timedelta(days=1)).isoformat()
        store.put_bytes(json.dumps(values).encode(), stat.key)
    new = FineTune(store, tmp_path / "b", run="run-0002").train(2)
    other = FineTune(store, tmp_path / "c", fine_tune="other").train(2)
    age(store)
    swept = {stat.key for stat in gc.plan(store, keep_last=1).sweep}
    assert keys(old["policy2"], new["policy1"], other["policy1"]) <= swept
    assert not keys(new["policy2"], other["policy2"]) & swept


def test_patches_and_their_full_copy_stay_with_the_policy_that_needs_them(tmp_path: Path) -> None:
    from tests.common.test_artifact_policies import Chain, weights_of

    store = FileStore(tmp_path / "store")
    chain = Chain(store, tmp_path / "trained")
    for _ in range(3):
        chain.step()
    age(store)
    plan = gc.plan(store, keep_last=1)
    assert set(weights_of(chain.policies[3]).keys) & {stat.key for stat in plan.sweep} == set()
    gc.sweep(store, plan)
    chain.check(3, tmp_path / "fetched")


def test_young_blobs_wait(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    FineTune(store, tmp_path / "files").train(3)
    plan = gc.plan(store, keep_last=1)
    assert plan.sweep == [] and len(plan.young) == 9  # policies, rollouts and scored of iterations 0 to 2


def test_a_blob_published_again_meanwhile_is_spared(tmp_path: Path) -> None:
    """The collector has its plan; then a run publishes the same content again, and only then comes the sweep."""
    store = FileStore(tmp_path / "store")
    tune = FineTune(store, tmp_path / "files")
    old = tune.make("policy", 0, {}, text="weights")
    tune.make("policy", 1, {}, text="others")
    age(store)
    plan = gc.plan(store, keep_last=1)
    assert {stat.key for stat in plan.sweep} == keys(old)
    again = tune.make("policy", 2, {}, text="weights")
    assert gc.sweep(store, plan) == 0
    artifacts.fetch(store, again, tmp_path / "fetched")


def test_files_of_an_old_artifact_taken_over_meanwhile_are_spared(store: Store, tmp_path: Path) -> None:
    """The collector has its plan; then another fine-tune starts from the old policy: no byte is sent, and none goes."""
    tune = FineTune(store, tmp_path / "files")
    old = tune.make("policy", 0, {}, text="weights")
    tune.make("policy", 1, {}, text="others")
    grace = timedelta(seconds=-10)  # everything is old
    plan = gc.plan(store, keep_last=1, grace=grace)
    assert {stat.key for stat in plan.sweep} == keys(old)
    again = artifacts.publish(
        store, context(fine_tune="other"), name="policy", kind="policy", files={}, reuse=old.files, iteration=0,
        producer=Producer(stage="configure", key="k", settings_digest="", code_version="1"),
    )  # fmt: skip
    assert gc.sweep(store, plan, grace=grace) == 0
    artifacts.fetch(store, again, tmp_path / "fetched")


def test_old_blobs_that_a_manifest_names_become_young(store: Store, tmp_path: Path, monkeypatch: Any) -> None:
    """Of its files and of its metadata, before the manifest is there: a collector may have its plan already."""
    tune = FineTune(store, tmp_path / "files")
    old = [tune.make("policy", number, {}, text=f"weights {number}") for number in range(2)]
    before = {key: store.stat(key) for key in keys(*old)}
    time.sleep(1.1)  # servers tell times in seconds
    monkeypatch.setattr(artifacts, "REFRESH_AFTER", timedelta(seconds=-60))
    artifacts.publish(
        store, context(fine_tune="other"), name="policy", kind="policy", files={}, reuse=old[0].files, iteration=0,
        producer=Producer(stage="configure", key="k", settings_digest="", code_version="1"),
        metadata={"base": [file.model_dump() for file in old[1].files]},
    )  # fmt: skip
    for key, was in before.items():
        found = store.stat(key)
        assert was and found and found.modified > was.modified, key
    for number, manifest in enumerate(old):
        artifacts.fetch(store, manifest, tmp_path / "fetched")
        assert (tmp_path / "fetched" / "file").read_text() == f"weights {number}"


@pytest.mark.parametrize("kind", ["moto", "rgw"])
def test_a_large_object_becomes_young_in_ranges(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "COPY_BYTES", 5 << 20)
    store, key = _large_blob(kind, request, tmp_path)
    before = store.stat(key)
    time.sleep(1.1)
    store.touch(key)
    after = store.stat(key)
    assert before and after and after.modified > before.modified
    store.get_file(key, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
    with pytest.raises(ArtifactNotFound):
        store.touch("nothing")


@pytest.mark.parametrize("kind", ["moto", "rgw"])
@pytest.mark.parametrize(("copy_bytes", "request_"), [(5 << 30, "CopyObject"), (5 << 20, "UploadPartCopy")])
@pytest.mark.parametrize("younger", [True, False])  # servers tell times in seconds: in the same one nothing is younger
def test_two_may_make_a_blob_young_at_once(
    kind: str, copy_bytes: int, request_: str, younger: bool, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What another writes, or our own copy whose answer was lost, comes before ours: the ETag is another."""
    monkeypatch.setattr(transfer, "COPY_BYTES", copy_bytes)
    store, key = _large_blob(kind, request, tmp_path)
    age = timedelta(seconds=3 if younger else -300)
    other, first, etags = open_store(store.url.replace("part_mib=5", "part_mib=6")), threading.Lock(), []

    def write_first(**_: object) -> None:
        if first.acquire(blocking=False):
            etags.append(store.client.head_object(**store.name(key))["ETag"])
            other.put_file(tmp_path / "file", key)
            etags.append(store.client.head_object(**store.name(key))["ETag"])

    store.client.meta.events.register(f"provide-client-params.s3.{request_}", write_first)
    head = store.client.head_object(**store.name(key))
    store._upload.renew(key, head | {"LastModified": head["LastModified"] - age})
    assert len(set(etags)) == 2
    store.get_file(key, tmp_path / "back")


@pytest.mark.parametrize("kind", ["moto", "rgw"])
def test_the_end_of_a_copy_in_ranges_names_the_checksums_the_server_tells(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS tells a checksum for each copied part and refuses an end that does not name it; neither server does so."""
    monkeypatch.setattr(transfer, "COPY_BYTES", 5 << 20)
    store, key = _large_blob(kind, request, tmp_path)
    data = (tmp_path / "file").read_bytes()
    told = [crc32c(data[at : at + (5 << 20)]) for at in range(0, len(data), 5 << 20)]
    ended = []

    def tell(parsed: dict[str, Any], context: dict[str, Any], **_: object) -> None:
        parsed["CopyPartResult"]["ChecksumCRC32C"] = told[context["number"] - 1]

    def note(params: dict[str, Any], context: dict[str, Any], **_: object) -> None:
        context["number"] = params["PartNumber"]

    def end(params: dict[str, Any], **_: object) -> None:
        ended.extend(part.pop("ChecksumCRC32C", None) for part in params["MultipartUpload"]["Parts"])

    store.client.meta.events.register("provide-client-params.s3.UploadPartCopy", note)
    store.client.meta.events.register("after-call.s3.UploadPartCopy", tell)
    store.client.meta.events.register("provide-client-params.s3.CompleteMultipartUpload", end)
    store.touch(key)
    assert ended == told


@pytest.mark.parametrize("kind", ["moto", "rgw"])
def test_a_copy_in_ranges_that_fails_leaves_no_upload_behind(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "COPY_BYTES", 5 << 20)
    store, key = _large_blob(kind, request, tmp_path)

    def out_of_range(params: dict[str, Any], **_: object) -> None:
        params["CopySourceRange"] = f"bytes={1 << 30}-{(1 << 30) + 1}"

    store.client.meta.events.register("provide-client-params.s3.UploadPartCopy", out_of_range)
    with pytest.raises(StoreError):
        store.touch(key)
    assert list(store.unfinished(key)) == []


def test_a_copy_in_ranges_whose_end_was_carried_out_and_not_answered_is_done(
    rgw_endpoint: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "COPY_BYTES", 5 << 20)
    store, key = _large_blob("rgw", request, tmp_path)
    before, other = store.stat(key), open_store(store.url)
    time.sleep(1.1)

    def end_first(params: dict[str, Any], **_: object) -> None:
        other.client.complete_multipart_upload(**params)
        params["UploadId"] += "x"  # this server answers the second end as the first; others know the upload no more

    store.client.meta.events.register("provide-client-params.s3.CompleteMultipartUpload", end_first)
    store.touch(key)
    after = store.stat(key)
    assert before and after and after.modified > before.modified


def _large_blob(kind: str, request: pytest.FixtureRequest, folder: Path) -> tuple[S3Store, str]:
    """A store with a blob of three parts, and its key."""
    store = open_store(store_url(kind, request, "&part_mib=5"))
    assert isinstance(store, S3Store)
    (folder / "file").write_bytes(os.urandom((11 << 20) + 7))
    key = blob_key(file_digest(folder / "file"))
    store.put_file(folder / "file", key)
    return store, key


def test_a_blob_written_again_between_two_attempts_to_delete_it_is_spared(moto_endpoint: str, tmp_path: Path) -> None:
    """The first request to delete is answered with SlowDown; before the second a run publishes the content again."""
    from botocore.exceptions import ClientError

    store = open_store(f"s3://grpo/{uuid.uuid4().hex}?endpoint={moto_endpoint}")
    assert isinstance(store, S3Store)
    tune = FineTune(store, tmp_path / "files")
    old = tune.make("policy", 0, {}, text="weights")
    tune.make("policy", 1, {}, text="others")
    time.sleep(1.1)
    cutoff = datetime.now(UTC).replace(microsecond=0)
    real, asked = store.client.delete_object, []

    def slow_down(**what: str) -> None:
        asked.append(what)
        if len(asked) > 1:
            return real(**what)
        store.put_bytes(b"weights", old.files[0].key)
        answer = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}
        raise ClientError(answer, "DeleteObject")

    store.client.delete_object = slow_down
    assert store.delete(old.files[0].key, before=cutoff) is False
    assert len(asked) == 1
    artifacts.fetch(store, old, tmp_path / "fetched")
    assert store.delete(old.files[0].key) is True


def test_a_manifest_whose_blob_went_as_it_was_written_is_taken_back(tmp_path: Path) -> None:
    class Late(FileStore):
        """A collector's request to delete, sent long ago, arrives together with the manifest."""

        def put_bytes(self, data: bytes, key: str, *, if_absent: bool = False) -> bool:
            for stat in list(self.list("blobs/")):
                self.delete(stat.key)
            return super().put_bytes(data, key, if_absent=if_absent)

    store = Late(tmp_path / "store")
    with pytest.raises(ArtifactNotFound, match="is gone, collected or deleted"):
        FineTune(store, tmp_path / "files").make("policy", 0, {})
    assert list(store.list("manifests/")) == []


def test_publishing_and_collecting_at_once_lose_nothing(tmp_path: Path) -> None:
    """One thread publishes content that is old garbage already; another collects without pause."""
    store = FileStore(tmp_path / "store")
    garbage = FineTune(store, tmp_path / "garbage", run="run-0001")
    for number in range(30):
        garbage.make("policy", number, {}, text=f"weights {number}")
    age(store)
    stop, freed = threading.Event(), []

    def collect() -> None:
        while not stop.is_set():
            freed.append(gc.sweep(store, gc.plan(store, keep_last=1)))

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        tune = FineTune(store, tmp_path / "files", fine_tune="other")
        made = []
        for number in range(30):
            try:
                made.append(tune.make("policy", number, {}, text=f"weights {number}"))
            except ArtifactNotFound:  # said so before the manifest was written: nothing promises what is gone
                made.append(tune.make("policy", number, {}, text=f"weights {number}"))
    finally:
        stop.set()
        collector.join()
    assert sum(freed) > 0
    for number, manifest in enumerate(made):
        artifacts.fetch(store, manifest, tmp_path / "fetched" / str(number))


def test_nothing_goes_while_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    FineTune(store, tmp_path / "files").train(3)
    store.put_bytes(b"{", "manifests/tune/run-0001/0000/broken.json")
    age(store)
    with pytest.raises(ArtifactError, match="is not a manifest"):
        gc.plan(store, keep_last=1)
    store.delete("manifests/tune/run-0001/0000/broken.json")
    store.put_bytes(b"{", "pointers/tune/champion.json")
    with pytest.raises(ArtifactError, match="is not a pointer"):
        gc.plan(store, keep_last=1)
    store.put_bytes(b"[1]", "pointers/tune/champion.json")
    with pytest.raises(ArtifactError, match="is not a pointer"):
        gc.plan(store, keep_last=1)


def test_keeping_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="keep_last must be at least 1, got 0"):
        gc.plan(FileStore(tmp_path), keep_last=0)


def test_what_died_while_being_written_goes_too(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    FineTune(store, tmp_path / "files").train(1)
    left = store.root / "blobs" / "blake3" / ".tmp-dead"
    left.write_bytes(b"half")
    age(store)
    gc.sweep(store, gc.plan(store, keep_last=1))
    assert not left.exists()


def test_a_temporary_file_that_its_writer_renames_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes(b"x", "name")
    real = Path.rglob

    def listed(self: Path, pattern: str) -> list[Path]:
        return [*real(self, pattern), store.root / ".tmp-renamed"]

    monkeypatch.setattr(Path, "rglob", listed)
    assert list(store.abandoned(datetime.now(UTC))) == []


def test_what_an_update_left_for_its_other_nodes_goes_too(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes(b"[]", "parts/0123/00001.json")
    assert [stat.key for stat in gc.plan(store, keep_last=1).young] == ["parts/0123/00001.json"]
    gc.sweep(store, gc.plan(store, keep_last=1, grace=timedelta(-1)), grace=timedelta(-1))
    assert list(store.list("parts/")) == []


def test_unfinished_uploads_of_a_bucket_go_too(rgw_store: Store, tmp_path: Path) -> None:
    assert isinstance(rgw_store, S3Store)
    (tmp_path / "file").write_bytes(b"x")
    key = blob_key(file_digest(tmp_path / "file"))
    rgw_store.client.create_multipart_upload(**rgw_store.name(key))
    assert len(list(rgw_store.unfinished())) == 1
    gc.sweep(rgw_store, gc.plan(rgw_store, keep_last=1))
    assert len(list(rgw_store.unfinished())) == 1  # young: someone may be at it
    gc.sweep(rgw_store, gc.plan(rgw_store, keep_last=1, grace=timedelta(-1)), grace=timedelta(-1))
    assert list(rgw_store.unfinished()) == []

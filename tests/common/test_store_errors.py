"""What can be wrong with a store, and what the user is told: what it was, and how to mend it."""

import datetime
import os
import shutil
import ssl
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from components.common import artifacts
from components.common.errors import AlreadyPublished, StoreError
from components.common.manifest import Producer
from components.common.patched import DeltaSettings, upload_policy
from components.common.s3_store import S3Store
from components.common.settings import RunContext
from components.common.store import FileStore, Store, open_store

MIB = 1 << 20


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        folder.rmdir()
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process, an ordinary user meanwhile, may not write to."""
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o600)
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    else:
        folder.chmod(0o555)
        (folder / "secret").chmod(0)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_full_disk_under_the_store(small_disk: Path, tmp_path: Path) -> None:
    store = FileStore(small_disk / "store")
    store.put_bytes(b"kept", "kept")
    (tmp_path / "large").write_bytes(bytes(5 * MIB))
    with pytest.raises(StoreError, match=r"No space left on device; free space there or choose another place"):
        store.put_file(tmp_path / "large", "large")
    assert store.stat("large") is None
    assert [stat.key for stat in store.list("")] == ["kept"]
    assert not list((small_disk / "store").glob(".tmp-*"))
    store.put_bytes(b"fits", "fits")


def test_a_full_disk_under_a_download(store: Store, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(6 * MIB))
    store.put_file(tmp_path / "large", "large")
    with pytest.raises(StoreError, match=r"No space left on device; free space there"):
        store.get_file("large", small_disk / "target")


def test_a_full_disk_under_a_fetch_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    (tmp_path / "large").write_bytes(os.urandom(6 * MIB))
    made = artifacts.publish(
        store, RunContext(fine_tune="t", run="r", store="", seed=0, iterations=1), name="policy", kind="policy",
        files={"large": tmp_path / "large"}, producer=Producer(stage="s", key="k", settings_digest="", code_version=""),
    )  # fmt: skip
    with pytest.raises(StoreError, match="No space left on device"):
        artifacts.fetch(store, made, small_disk / "fetched")
    assert os.listdir(small_disk / "fetched") == []


def test_a_full_disk_under_a_patch_and_what_it_makes(small_disk: Path, tmp_path: Path) -> None:
    """Half of all values changed at random: a patch of about 6.5 MB of a policy of 8 MB."""
    from tests.common.test_artifact_policies import CONTEXT, producer
    from tests.common.test_delta_codec import policy_pair

    store = FileStore(tmp_path / "store")
    files = {}
    for part, path in zip(("base", "new"), policy_pair(tmp_path, count=4_000_000, share=0.5), strict=True):
        (tmp_path / part[0]).mkdir()
        files[part] = path.rename(tmp_path / part[0] / "model.safetensors")
    base = artifacts.publish(
        store, CONTEXT, name="policy", kind="policy", files={"model.safetensors": files["base"]}, producer=producer("b")
    )
    uploaded, _ = upload_policy(
        store, {"model.safetensors": files["new"]}, base, tmp_path / "b", DeltaSettings(max_share=1)
    )
    assert uploaded[0].patch
    (small_disk / "n").mkdir()
    os.symlink(files["new"], small_disk / "n" / "model.safetensors")
    with pytest.raises(StoreError, match=r"cannot write a patch of .*: No space left on device; free space there"):
        new = {"model.safetensors": small_disk / "n" / "model.safetensors"}
        (small_disk / "filler").write_bytes(bytes(3 * MIB + MIB // 2))
        upload_policy(store, new, base, tmp_path / "b", DeltaSettings(max_share=1))
    (small_disk / "filler").unlink()
    made = artifacts.publish(
        store, CONTEXT, name="next", kind="policy", files={}, reuse=uploaded, producer=producer("n")
    )
    with pytest.raises(StoreError, match=r"cannot write .*: No space left on device; free space there"):
        artifacts.fetch(store, made, small_disk / "fetched")
    assert os.listdir(small_disk / "fetched") == []


def test_a_folder_one_may_not_write_to(read_only: Path) -> None:
    store = FileStore(read_only)
    with pytest.raises(StoreError, match=r"cannot write .*: Permission denied; give this user the right to"):
        store.put_bytes(b"x", "folder/name")
    with pytest.raises(StoreError, match=r"cannot read .*: Permission denied; give this user the right to"):
        store.get_bytes("secret")


def test_a_bucket_that_is_not_there(rgw_endpoint: str, tmp_path: Path) -> None:
    store = S3Store.from_url(f"s3://no-such-bucket?endpoint={rgw_endpoint}")
    with pytest.raises(StoreError, match="there is no bucket no-such-bucket; create it, or correct the store's URL"):
        store.put_bytes(b"x", "name")
    with pytest.raises(StoreError, match="there is no bucket no-such-bucket"):
        list(store.list(""))
    with pytest.raises(StoreError, match="there is no bucket no-such-bucket"):
        store.get_bytes("name")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "the secret key is wrong; check AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "unknown", "the access key is not known there; check AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_credentials(
    rgw_endpoint: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    store = S3Store.from_url(f"s3://grpo?endpoint={rgw_endpoint}")
    with pytest.raises(StoreError, match=message):
        store.put_bytes(b"x", "name")
    with pytest.raises(StoreError, match=message):
        store.stat("name")  # a HEAD request, whose answer does not say why


def test_no_credentials_at_all(rgw_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    store = S3Store.from_url(f"s3://grpo?endpoint={rgw_endpoint}")
    with pytest.raises(StoreError, match="no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        store.put_bytes(b"x", "name")


def test_credentials_of_a_profile(rgw_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n[other]\naws_access_key_id = x\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    store = S3Store.from_url(f"s3://grpo/{uuid.uuid4().hex}?endpoint={rgw_endpoint}&profile=mine")
    assert store.put_bytes(b"x", "name")


def test_a_clock_that_is_wrong(rgw_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth

    real = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: real() - datetime.timedelta(hours=2))
    store = S3Store.from_url(f"s3://grpo?endpoint={rgw_endpoint}")
    with pytest.raises(StoreError, match="the clocks of this machine and of the server differ too much"):
        store.put_bytes(b"x", "name")


def test_what_one_may_not_do(rgw_endpoint: str) -> None:
    """Somebody else's bucket."""
    import boto3
    from botocore.config import Config

    config = Config(s3={"addressing_style": "path"})
    client = boto3.Session().client("s3", endpoint_url=rgw_endpoint, region_name="us-east-1", config=config)
    bucket = f"guarded-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    arn = f"arn:aws:s3:::{bucket}/*"
    deny = f'{{"Effect":"Deny","Principal":"*","Action":"s3:PutObject","Resource":"{arn}"}}'
    client.put_bucket_policy(Bucket=bucket, Policy=f'{{"Version":"2012-10-17","Statement":[{deny}]}}')
    with pytest.raises(StoreError, match=f"the credentials may not do this in {bucket}"):
        S3Store.from_url(f"s3://{bucket}?endpoint={rgw_endpoint}").put_bytes(b"x", "name")


def test_a_server_that_is_not_there(s3_credentials: pytest.MonkeyPatch) -> None:
    store = S3Store.from_url("s3://grpo?endpoint=http://127.0.0.1:9&deadline=0.5")
    with pytest.raises(StoreError, match=r"nothing answers there: is the endpoint right and the server up\?"):
        store.put_bytes(b"x", "name")


def test_a_certificate_that_is_not_trusted(s3_credentials: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"], capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        store = S3Store.from_url(f"s3://grpo?endpoint=https://127.0.0.1:{server.server_address[1]}&deadline=2")
        with pytest.raises(StoreError, match=r"certificate is not trusted: .* give its CA in AWS_CA_BUNDLE"):
            store.put_bytes(b"x", "name")
    finally:
        server.shutdown()
        server.server_close()


def test_a_name_taken_by_other_work(store: Store, tmp_path: Path) -> None:
    context = RunContext(fine_tune="t", run="r", store="", seed=0, iterations=1)

    def publish(key: str, text: str) -> str:
        (tmp_path / "file").write_text(text)
        producer = Producer(stage="s", key=key, settings_digest="", code_version="")
        made = artifacts.publish(
            store, context, name="policy", kind="policy", files={"file": tmp_path / "file"}, producer=producer
        )
        return made.digest

    first = publish("k", "one")
    assert publish("k", "two") == first  # the same work again: the first one's result stands
    with pytest.raises(AlreadyPublished, match="was already made with other settings or inputs; start another run"):
        publish("other", "three")


def test_a_store_is_opened_without_asking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store("s3://bucket/prefix?endpoint=http://127.0.0.1:9").url.startswith("s3://bucket/prefix")

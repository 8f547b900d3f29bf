"""Object stores for the tests: a folder, moto's S3 server, and Ceph's RADOS gateway (a real S3 server)."""

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.common.store import Store, open_store

SCRIPT = Path(__file__).parents[2] / "scripts" / "ceph_rgw.py"
BUCKET = "grpo"


def make_bucket(endpoint: str) -> str:
    """A bucket on the server and the endpoint it is reached at."""
    import boto3
    from botocore.config import Config

    client = boto3.Session().client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
    )
    client.create_bucket(Bucket=BUCKET)
    return endpoint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node cache for each test, never the user's."""
    monkeypatch.setenv("GRPO_CACHE_DIR", str(tmp_path / "node-cache"))


@pytest.fixture(scope="session")
def s3_credentials() -> Iterator[pytest.MonkeyPatch]:
    """The credentials of the test servers, in the environment where boto3 looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "grpo-test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield patch


@pytest.fixture(scope="session")
def moto_endpoint(s3_credentials: pytest.MonkeyPatch) -> Iterator[str]:
    """moto's server: the protocol, without integrity, authentication or speed."""
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server]'")
    running = server.ThreadedMotoServer(port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        one_write_at_a_time(patch)
        running.start()
        _, port = running.get_host_and_port()
        yield make_bucket(f"http://127.0.0.1:{port}")
        running.stop()


def one_write_at_a_time(patch: pytest.MonkeyPatch) -> None:
    """moto looks whether a condition holds and then writes: of two writers at once both could win, which S3 rules out
    (2 of 60 races of 8 writers, where Python changes threads often enough)."""
    from moto.s3.responses import S3Response

    real, lock = S3Response.put_object, threading.Lock()

    def put_object(self: S3Response) -> Any:
        with lock:
            return real(self)

    patch.setattr(S3Response, "put_object", put_object)


@pytest.fixture(scope="session")
def rgw_endpoint(s3_credentials: pytest.MonkeyPatch) -> Iterator[str]:
    """Ceph RGW, started for this test session; it ends when its standard input closes, however we end."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    line = process.stdout.readline()
    if not line:
        reason = process.stderr.read().strip()
        process.wait()
        if os.environ.get("GRPO_REQUIRE_RGW"):
            pytest.fail(reason)
        pytest.skip(f"no real S3 server on this machine: {reason}")
    environment = json.loads(line)
    for name, value in environment.items():
        s3_credentials.setenv(name, value)
    yield make_bucket(environment["GRPO_S3_ENDPOINT"])
    process.stdin.close()  # type: ignore[union-attr]
    process.wait(timeout=60)


def store_url(kind: str, request: pytest.FixtureRequest, options: str = "") -> str:
    """URL of an empty store of a kind: `file`, `moto` or `rgw`."""
    if kind == "file":
        return (request.getfixturevalue("tmp_path") / "store").as_uri()
    endpoint = request.getfixturevalue(f"{kind}_endpoint")
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}?endpoint={endpoint}{options}"


@pytest.fixture(params=["file", "moto", "rgw"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store of each kind; parts are small, so that small files travel in several."""
    return open_store(store_url(request.param, request, "&part_mib=5"))


@pytest.fixture
def rgw_store(request: pytest.FixtureRequest) -> Store:
    """An empty store on the real server."""
    return open_store(store_url("rgw", request, "&part_mib=5"))

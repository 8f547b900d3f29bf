"""SIGKILL at every step of a publish: the store stays readable, and the rerun completes.

The publishing process kills itself right before or right after its n-th step; a step is a request to the server, or a
system call that changes the folder. n grows until a process gets through. Requests that are under way when it dies may
still be carried out, except that which begins an upload in parts: it would be begun after the rerun had looked for it.
"""

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.common import artifacts
from components.common.lineage import history
from components.common.manifest import Manifest, Producer
from components.common.s3_client import Location, make_client
from components.common.s3_store import S3Store
from components.common.settings import RunContext
from components.common.store import Store, open_store
from tests.common.conftest import store_url

MIB = 1 << 20
CONTEXT = RunContext(fine_tune="tune", run="run-0001", store="", seed=0, iterations=1)
MOST_STEPS = 60


def publish(store: Store, folder: Path, context: RunContext = CONTEXT) -> Manifest:
    """A large file in two parts and a small one."""
    return artifacts.publish(
        store, context, name="policy", kind="policy", files={path.name: path for path in folder.iterdir()}, iteration=1,
        producer=Producer(stage="update", key="k", settings_digest="", code_version="1"),
    )  # fmt: skip


def count_steps(store: Store, step: Callable[[], None], alone: threading.RLock) -> None:
    """Calls `step` before every request, and after those that write whole objects; around every change of a folder.
    While an upload in parts is being begun `alone` is held."""
    if hasattr(store, "client"):

        def begin(**_: Any) -> None:
            alone.acquire()

        events = store.client.meta.events
        events.register("before-send.s3", lambda **_: step())
        events.register("after-call.s3.PutObject", lambda **_: step())
        events.register("before-send.s3.CreateMultipartUpload", begin)
        for name in ("after-call", "after-call-error"):
            events.register(f"{name}.s3.CreateMultipartUpload", lambda **_: alone.release())
        return
    for module, name in ((shutil, "copyfile"), (os, "replace"), (os, "link"), (os, "fsync")):
        original = getattr(module, name)

        def counted(*arguments: Any, original: Callable[..., Any] = original) -> Any:
            step()
            result = original(*arguments)
            step()
            return result

        setattr(module, name, counted)


def reopen(url: str, client: Any) -> Store:
    """The store again; making a client takes longer than publishing with it."""
    return S3Store(Location.parse(url), client) if client else open_store(url)


def killed_publish(url: str, client: Any, folder: Path, at: int) -> None:
    store, lock, steps = reopen(url, client), threading.RLock(), 0

    def step() -> None:
        nonlocal steps
        with lock:
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)

    count_steps(store, step, lock)
    publish(store, folder)


def run_killed(url: str, folder: Path, at: int, client: Any = None) -> bool:
    """Whether the process was killed before it was done. `client` must be unused: a fork shares its connections."""
    process = multiprocessing.get_context("fork").Process(target=killed_publish, args=(url, client, folder, at))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("kind", ["file", "rgw"])
def test_killed_at_every_step(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(6 * MIB))
    (folder / "config.json").write_text("{}")
    at = 1
    first = open_store(store_url(kind, request, "&part_mib=5"))
    unused = make_client(first.location.options) if isinstance(first, S3Store) else None
    used = first.client if isinstance(first, S3Store) else None
    for at in range(1, MOST_STEPS):
        url = store_url(kind, request, "&part_mib=5").replace("/store", f"/store{at}")
        if not run_killed(url, folder, at, unused):
            break
        store = reopen(url, used)
        for one in history(store):  # whatever a reader finds is whole
            artifacts.fetch(store, one.manifest, tmp_path / "read")
        made = publish(store, folder)
        artifacts.fetch(store, made, tmp_path / f"fetched{at}")
        for path in folder.iterdir():
            assert (tmp_path / f"fetched{at}" / path.name).read_bytes() == path.read_bytes()
        if hasattr(store, "unfinished"):
            assert list(store.unfinished()) == []
        shutil.rmtree(tmp_path / f"fetched{at}")
    assert at >= (10 if kind == "file" else 12), "the steps were not counted"
    assert at < MOST_STEPS - 1, "no publish got through"


def poll(url: str, folder: Path, told: Any) -> None:
    """A reader that looks at the store without pause, and fetches all it finds, until it is told to stop; then once
    more, for what came after its last look."""
    store, found, last = open_store(url), set(), False
    try:
        while not last:
            last = told.poll()
            for one in history(store):
                artifacts.fetch(store, one.manifest, folder)
                found.add(one.name)
        told.send(found)
    except Exception as error:
        told.send(repr(error))


def test_a_reader_never_sees_a_manifest_before_its_blobs(tmp_path: Path) -> None:
    """A reader polls while publishes are killed at random moments; what it finds it can fetch."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(2 * MIB))
    url, context, draw = (tmp_path / "store").as_uri(), multiprocessing.get_context("fork"), random.Random(0)
    ours, theirs = context.Pipe()
    reader = context.Process(target=poll, args=(url, tmp_path / "read", theirs))
    reader.start()
    killed, seconds = 0, 0.0
    for turn in range(20):
        (folder / "config.json").write_text(f"{turn}")
        run = CONTEXT.model_copy(update={"run": f"run-{turn:04d}"})
        process = context.Process(target=publish, args=(open_store(url), folder, run))
        started = time.monotonic()
        process.start()
        process.join(draw.uniform(0, seconds) if turn else 60)
        if process.exitcode is None:
            process.kill()
            process.join(60)
        else:  # each that gets through tells how long a publish takes by now: the first one writes more
            seconds = time.monotonic() - started
        killed += process.exitcode == -signal.SIGKILL
    ours.send("stop")
    found = ours.recv()
    reader.join(60)
    names = {one.name for one in history(open_store(url))}
    assert found == names, found
    assert killed and "tune/run-0000/0001/policy" in names

"""The stage as its own process: ranks that die, and being told to stop."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_case import PATIENCE, Outcome

from components.common.errors import StageError
from components.common.integrity import blob_key
from components.common.store import FileStore
from components.update import launch, nodes
from tests.ports import held_port

pytestmark = pytest.mark.slow

ENDLESS = {"num_epochs": 1_000_000, "num_processes": 2, "num_threads": 1}
"""More optimizer steps than any test waits for."""


def children(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def workers(process, count: int) -> list[int]:
    """Waits until the stage has its workers, and until they train."""
    deadline = time.monotonic() + PATIENCE
    while len(found := children(process.pid)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ticks = [cpu_ticks(pid) for pid in found]
    while any(cpu_ticks(pid) < start + 100 for pid, start in zip(found, ticks, strict=True)):  # a second of work each
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def running(case, engine_model):
    """A stage process that trains for ever; ended when the test is."""
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    process = case.command(inputs, scored, **ENDLESS)
    yield case, process
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def outputs(case):
    found = [entry.key for entry in case.store.list("manifests/") if "/0001/" in entry.key]
    return found + [path.name for path in case.folder.glob("run-next_*.json")]


def test_a_dead_rank_ends_the_stage_with_its_name(running):
    case, process = running
    victim = workers(process, 2)[1]
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "rank 1 was killed by SIGKILL" in output or "rank 0 was killed by SIGKILL" in output
    assert "nothing was published" in output
    assert outputs(case) == []


def test_sigterm_drops_the_step_and_leaves_no_process(running):
    case, process = running
    found = workers(process, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "stopped by SIGTERM; nothing was published" in output
    assert outputs(case) == []
    assert not any(alive(pid) for pid in found)


def test_two_nodes_make_the_policy_that_one_makes(case, engine_model):
    """As Kubeflow Trainer starts them: the same command on each, told apart by torchrun's variables."""
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    settings = {"zero_stage": 2, "max_tokens_per_microbatch": 24}
    case.run_name = "one-node"
    wanted = case.update(inputs, scored, num_processes=2, **settings)
    case.run_name = "two-nodes"
    with held_port() as port:
        variables = {
            "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        nodes = [
            case.command(inputs, scored, variables=variables | {"PET_NODE_RANK": str(rank)}, **settings)
            for rank in range(2)
        ]
        for node in nodes:
            output, _ = node.communicate(timeout=PATIENCE)
            assert node.returncode == 0, output
    paths = [case.folder / f"two-nodes-{name}-0.json" for name in ("next_policy", "next_optimizer")]
    found = Outcome(case, *paths, inputs["reference"])
    for name, weight in wanted.weights().items():
        assert torch.equal(found.weights()[name], weight), name
    assert found.optimizer.names == wanted.optimizer.names
    assert found.optimizer.digest == wanted.optimizer.digest
    assert list(case.store.list("parts/")) == []


def test_what_a_killed_attempt_left_is_not_mixed_into_the_next(tmp_path, monkeypatch):
    """Two nodes: the second has uploaded and told of its state, then all were killed; the work's key stays the same."""
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setattr(nodes, "WAIT_SECONDS", -1.0)
    digest = "blake3:" + "0" * 64

    def told(name):
        return json.dumps([{"name": name, "size": 1, "digest": digest, "key": blob_key(digest)}]).encode()

    def attempt(name):
        work_dir = tmp_path / name
        work_dir.mkdir()
        (work_dir / "attempt").write_text(name)
        return SimpleNamespace(store=store, producer=SimpleNamespace(key="sha256:abc"), work_dir=work_dir)

    store = FileStore(tmp_path / "store")
    killed, now = attempt("aa"), attempt("bb")
    store.put_bytes(told("old"), "parts/abc/00001.json")
    store.put_bytes(told("killed"), nodes._key(killed, 1))
    store.put_bytes(b"{}", "parts/abc/task.json")
    with pytest.raises(StageError, match="node 1 has not uploaded its optimizer state"):
        nodes.collect(now)
    store.put_bytes(told("now"), nodes._key(now, 1))
    assert [file.name for file in nodes.collect(now)] == ["now"]
    nodes.clear(now)
    assert [stat.key for stat in store.list("")] == ["parts/abc/task.json"]


worker = launch.work


def starved(folder: str) -> None:
    """The worker, with a quarter of a gigabyte to grow."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    worker(folder)


def test_too_little_memory_names_the_setting_to_lower(case, engine_model, monkeypatch):
    inputs = case.start(engine_model)
    scored = case.scored(
        "scored", engine_model, inputs["policy"], num_prompts=100, group_size=60, lengths=[12] * 6000, scores=False
    )
    monkeypatch.setattr(launch, "work", starved)
    with pytest.raises(StageError, match=r"out of memory .*lower max_tokens_per_microbatch \(now 500000\)"):
        case.update(inputs, scored, max_tokens_per_microbatch=500_000)
    assert outputs(case) == []
    unlimited = {"max_logp_difference": None}  # log-probabilities are made up
    outcome = case.update(inputs, scored, max_tokens_per_microbatch=2_000, health=unlimited)
    assert outcome.metrics["num_tokens"] > 50_000


def crippled(folder: str) -> None:
    """The worker, with a file where its results should go."""
    (Path(folder) / "next").write_text("")
    worker(folder)


def test_a_rank_that_fails_shows_its_last_lines(case, engine_model, monkeypatch):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    monkeypatch.setattr(launch, "work", crippled)
    with pytest.raises(StageError, match=r"(?s)rank 0 failed; nothing was published.*in _save.*NotADirectoryError"):
        case.update(inputs, scored)
    assert outputs(case) == []


SERVE_TWELVE_TIMES = """
from torch.distributed import TCPStore
from components.update.launch import _local_rendezvous

for _ in range(12):
    _, held = _local_rendezvous()
    torchruns = TCPStore("127.0.0.1", held.port, 1, True, multi_tenant=True)
    del torchruns, held
"""


def test_a_port_that_this_process_served_before_serves_again():
    """Twelve launches in a network that has eight ports."""
    ports = "/proc/sys/net/ipv4/ip_local_port_range"
    script = f'ip link set lo up && echo 40000 40007 >{ports} && exec {sys.executable} -c "$0"'
    if subprocess.run(["unshare", "-rn", "sh", "-c", f"echo 40000 40007 >{ports}"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    done = subprocess.run(["unshare", "-rn", "sh", "-c", script, SERVE_TWELVE_TIMES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

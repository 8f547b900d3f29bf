"""`grpo submit --wait` and `grpo status` against a server that speaks the calls: tasks, pods, logs, metrics."""

import io
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from cluster_server import Cluster, task_details, write_kubeconfig

from components.common import kube
from components.common.errors import StageError
from components.common.manifest import Manifest, content_digest, manifest_key
from components.common.settings import RunContext, TrackingSettings
from components.common.store import open_store
from pipeline.cli import app
from pipeline.connection import Connection
from pipeline.waiting import watch

TAINT = "0/3 nodes are available: 3 node(s) had untolerated taint {team: red}"


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    monkeypatch.setattr(kube, "FIRST_PAUSE_SECONDS", 0.01)
    found = Cluster()
    write_kubeconfig(found, tmp_path, monkeypatch)
    found.runs["r"] = {"run_id": "r", "state": "RUNNING", "experiment_id": "e", "display_name": "f-1",
                       "created_at": "2026-01-01T00:00:00Z"}  # fmt: skip
    yield found
    found.close()


@pytest.fixture
def waited(cluster, monkeypatch):
    """Follows the run through the steps, one a poll; gives what was shown."""

    def follow_through(*steps, store=None):
        remaining = list(steps)

        def next_step(_seconds):
            remaining.pop(0)()

        monkeypatch.setattr("pipeline.following.sleep", next_step)
        context = RunContext(fine_tune="f", run="r", store="file:///x", seed=0, first_iteration=0, iterations=2,
                             shards=1, staleness=0, tracking=TrackingSettings())  # fmt: skip
        out = io.StringIO()
        client = Connection(host=cluster.url).open()
        try:
            watch(client, "r", context, Console(file=out, width=200), namespace=None, store=store)
        finally:
            assert not remaining
            follow_through.text = out.getvalue()
        return out.getvalue()

    return follow_through


def tasks(cluster, state="RUNNING", **states):
    cluster.runs["r"] |= {"state": state, "run_details": task_details(**states)}


def pod(name, stage, phase="Pending", **status):
    labels = {"pipeline/runid": "r", "app.kubernetes.io/component": stage}
    metadata = {"name": name, "namespace": "kubeflow", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": metadata, "spec": {"containers": []}, "status": {"phase": phase, **status}}


def unscheduled(name="p1", message=TAINT):
    return pod(name, "update", conditions=[{"type": "PodScheduled", "status": "False", "message": message}])


def test_tasks_are_shown_as_of_a_local_run_with_the_metrics_of_the_store(cluster, waited, tmp_path):
    """A run that goes on from iteration 4: its own first is the graph's 0."""
    store = open_store((tmp_path / "store").as_uri())
    for iteration, name, metrics in (
        (4, "policy", {}), (4, "completions-00", {"rollout/num_completions": 64.0}), (4, "scored", {"reward": 0.25}),
        (5, "policy", {"loss": 0.5, "grad_norm": 2.0}), (4, "evaluation", {"eval/pass@1": 0.375}),
    ):  # fmt: skip
        manifest = Manifest.model_validate({
            "kind": "policy", "digest": content_digest("policy", []), "fine_tune": "f", "run": "r",
            "created": datetime.now(UTC),
            "producer": {"stage": "s", "key": "", "settings_digest": "", "code_version": ""}, "store": store.url,
            "metrics": metrics,
        })  # fmt: skip
        store.put_bytes(manifest.dump(), manifest_key("f", "r", iteration, name))
    ended = dict.fromkeys(("configure", "rollout", "reward", "update", "evaluate"), "SUCCEEDED")
    text = waited(lambda: tasks(cluster, **ended), lambda: tasks(cluster, "SUCCEEDED", **ended), store=store)
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line[:1].isdigit()}
    assert list(lines) == ["configure", "rollout 0", "reward 0", "update 0", "evaluate 0"]
    assert "2.0 s  loss 0.5  grad_norm 2" in lines["update 0"] and "num_completions 64" in lines["rollout 0"]
    heading, sampled, updated = text.splitlines()[-3:]
    assert "pass@1" in heading and sampled.split()[:3] == ["0", "37.5%", "0.250"]
    assert updated.split()[:2] == ["1", "+0.5000"]


def test_a_pod_that_is_not_scheduled_says_why_once(cluster, waited):
    cluster.pods = [unscheduled()]
    text = waited(lambda: None, lambda: cluster.pods.clear(), lambda: tasks(cluster, "SUCCEEDED"))
    assert text.count(TAINT) == 1 and 'cluster.update.tolerations = [{ key = "team" }]' in text
    cluster.runs["r"]["state"] = "RUNNING"
    cluster.pods = [unscheduled(message="0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")]
    assert "nvidia.com/gpu is short" in waited(lambda: tasks(cluster, "SUCCEEDED"))


def test_an_image_that_cannot_be_pulled_is_named(cluster, waited):
    state = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    status = {"name": "main", "image": "registry/update@sha256:1", "imageID": "", "ready": False, "restartCount": 0}
    cluster.pods = [pod("p1", "update", containerStatuses=[status | {"state": state}])]
    text = waited(lambda: tasks(cluster, "SUCCEEDED"))
    assert "p1: main: ErrImagePull: not found (image registry/update@sha256:1:" in text


def test_the_log_of_a_failed_pod_is_shown_at_once_and_the_run_fails_by_its_task(cluster, waited):
    cluster.pods = [pod("p1", "update", "Failed"), pod("p0", "rollout", "Succeeded")]
    cluster.logs = {"p1": "same\nsame\nHealthError: KL 9", "p0": "fine"}
    seen = []

    def failed():
        seen.append(cluster.counted("GET", "/pods/p1/log"))  # while the run goes on: it may be retried
        tasks(cluster, "FAILED", update="SUCCEEDED", update_2="FAILED")

    with pytest.raises(StageError, match="run r ended as failed in update 1"):
        waited(lambda: None, failed)
    assert seen == [1] and waited.text.count("  same") == 2 and waited.text.count("KL 9") == 1
    assert "fine" not in waited.text


def test_the_newest_log_is_shown_where_no_pod_counts_as_failed(cluster, waited):
    cluster.pods, cluster.logs = [pod("p1", "update", "Running")], {"p1": "last words"}
    with pytest.raises(StageError, match="in update 0"):
        waited(lambda: tasks(cluster, "FAILED", update="FAILED"))
    assert "last words" in waited.text
    cluster.pods.clear()
    tasks(cluster, "RUNNING")
    with pytest.raises(StageError, match="in update 0"):
        waited(lambda: tasks(cluster, "FAILED", update="FAILED"))
    assert "no pod of update left" in waited.text


def test_without_a_kubeconfig_the_run_is_followed_and_its_end_told(cluster, waited, tmp_path, monkeypatch):
    (tmp_path / "kubeconfig").unlink()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(StageError, match="run r ended as failed in update 0"):
        waited(lambda: None, lambda: tasks(cluster, "FAILED", update="FAILED"))
    assert waited.text.count("pods and their logs are not shown") == 1


def test_status_says_why_pods_do_not_start(cluster):
    cluster.experiments["e"] = {"experiment_id": "e", "display_name": "grpo-f"}
    cluster.pods = [unscheduled()]
    tasks(cluster, update="RUNNING")
    shown = CliRunner().invoke(app, ["status", "f", "--host", cluster.url]).output
    assert TAINT in shown and "update 0" in shown
    cluster.runs["r"]["state"] = "CANCELED"
    assert TAINT not in CliRunner().invoke(app, ["status", "f", "--host", cluster.url]).output

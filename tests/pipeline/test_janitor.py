"""The janitor, against a server that speaks the Kubernetes calls it makes."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kubernetes import client as kubernetes_client

sys.path.insert(0, str(Path(__file__).parent))

from cluster_server import Cluster

from components.common import kube
from components.common.kube import ClusterError
from pipeline import janitor

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
GRACE = timedelta(minutes=10)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(kube, "FIRST_PAUSE_SECONDS", 0.01)
    found = Cluster()
    settings = kubernetes_client.Configuration()
    settings.host, settings.retries = found.url, False
    monkeypatch.setattr(kubernetes_client.Configuration, "_default", settings)
    yield found
    found.close()


def add(cluster, name, *, workflow="w", uid="u", minutes=60, label="grpo-pipeline", **metadata):
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": workflow, "uid": uid}
    created = (NOW - timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")
    cluster.train_jobs[name] = {"metadata": {
        "name": name, "labels": {"app.kubernetes.io/part-of": label}, "creationTimestamp": created,
        "ownerReferences": [owner] if workflow else [], **metadata,
    }}  # fmt: skip


def workflow(cluster, name, phase, uid="u"):
    cluster.workflows[name] = {"metadata": {"name": name, "uid": uid}, "status": {"phase": phase}}


def clean(dry_run=False):
    found = janitor.clean("kubeflow", grace=GRACE, dry_run=dry_run, now=NOW)
    return {verdict.name: (verdict.delete, verdict.why) for verdict in found}


def fill(cluster):
    workflow(cluster, "on", "Running")
    for phase in janitor.ENDED:
        workflow(cluster, phase.lower(), phase)
        add(cluster, f"of-{phase.lower()}", workflow=phase.lower())
    add(cluster, "of-running", workflow="on")
    add(cluster, "of-gone", workflow="gone")
    add(cluster, "of-namesake", workflow="on", uid="an earlier one of that name")
    add(cluster, "alone", workflow=None)
    add(cluster, "young", workflow="gone", minutes=9)
    add(cluster, "going", workflow="gone", deletionTimestamp="2026-01-01T11:59:00Z")
    add(cluster, "others", workflow="gone", label="someone-else")


KEPT = {"of-running", "young", "going"}
DELETED = {"of-succeeded", "of-failed", "of-error", "of-gone", "of-namesake", "alone"}


def test_only_what_a_run_left_behind_is_deleted(cluster):
    fill(cluster)
    found = clean()
    assert {name for name, (delete, _) in found.items() if delete} == DELETED
    assert found.keys() == KEPT | DELETED, "others' are not even looked at"
    assert cluster.train_jobs.keys() == KEPT | {"others"}
    assert "has ended: Failed" in found["of-failed"][1] and "is gone" in found["of-gone"][1]
    assert not any(delete for delete, _ in clean().values())


def test_a_dry_run_deletes_nothing(cluster):
    fill(cluster)
    assert {name for name, (delete, _) in clean(dry_run=True).items() if delete} == DELETED
    assert cluster.counted("DELETE", "trainjobs") == 0


@pytest.mark.parametrize("faults", [[500, 429, "drop"], ["drop", 503]])
def test_a_busy_server_is_asked_again(cluster, faults):
    fill(cluster)
    cluster.faults["/trainjobs"] = list(faults)
    cluster.faults["/workflows"] = list(faults)
    assert {name for name, (delete, _) in clean().items() if delete} == DELETED


def test_one_that_cannot_be_judged_does_not_stop_the_rest(cluster):
    """A Workflow that nobody may read says nothing: its job stays."""
    fill(cluster)
    cluster.faults["/workflows/failed"] = [403]
    with pytest.raises(ClusterError, match="403"):
        clean()
    assert cluster.train_jobs.keys() == KEPT | {"others", "of-failed"}


def test_one_that_ends_meanwhile_is_no_error(cluster):
    fill(cluster)
    cluster.faults["/trainjobs/of-gone"] = [404]
    assert clean()["of-gone"][0]


def test_without_kubeflow_trainer_there_is_nothing_to_do(cluster):
    cluster.faults["/trainjobs"] = [404]
    assert clean() == {}


def test_it_says_what_it_did(cluster, monkeypatch, capsys):
    monkeypatch.setattr("kubernetes.config.load_config", lambda: None)
    fill(cluster)
    janitor.main(["--namespace", "kubeflow"])
    lines = capsys.readouterr().out.splitlines()
    assert "TrainJob of-gone deleted: Workflow gone is gone" in lines
    assert "TrainJob of-running kept: Workflow on goes on" in lines
    cluster.faults["/trainjobs"] = [401]
    with pytest.raises(SystemExit) as ended:
        janitor.main(["--namespace", "kubeflow"])
    assert ended.value.code == 1 and "expired" in capsys.readouterr().err

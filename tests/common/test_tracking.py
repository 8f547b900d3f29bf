"""MLflow gets what the store has, once; a server that is down or hangs costs a warning."""

import logging
import socket
import threading
import time

import pytest

from components.common import tracking
from components.common.manifest import Manifest, Producer, content_digest, now
from components.common.settings import RunContext, TrackingSettings

PATIENT = 600.0
"""Seconds for what must succeed: MLflow takes seconds of CPU each time, and a busy machine has few to give."""
SETTINGS = {"update": {"learning_rate": 1e-6, "loss_type": "dapo"}, "seed": 3, "model": "base", "unset": None}


def context(uri, run="run-1", **options):
    tracked = TrackingSettings(uri=uri, experiment="tests", **options)
    return RunContext(fine_tune="sums", run=run, store="file:///nowhere", seed=0, iterations=2, tracking=tracked)


def record(iteration, run="run-1", **metrics):
    return {
        "run": run,
        "iteration": iteration,
        "created": f"2026-01-02T03:{iteration:02d}:00+00:00",
        "metrics": metrics,
    }


def policy(iteration=2):
    return Manifest(
        kind="policy", digest=content_digest("policy", ()), parents={"scored": "blake3:" + "5" * 64}, fine_tune="sums",
        run="run-1", iteration=iteration, created=now(), store="file:///nowhere",
        producer=Producer(stage="update", key="k", settings_digest="s", code_version="v"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty MLflow database, made once: its tables take 3 s of CPU."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    (folder / "report.html").write_text("<p>first</p>")
    first = tracking.sync(
        context(uri), records=[record(0, reward=0.25, **{"eval/pass@1": 0.5})], settings=SETTINGS,
        artifacts=[folder / "report.html"], deadline=PATIENT,
    )  # fmt: skip
    return folder, uri, first


@pytest.fixture
def client(database):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=database[1], registry_uri=database[1])


def test_a_fine_tune_is_one_run_and_nothing_is_logged_twice(database, client):
    """One story, since each call takes seconds: a second evaluation, the next run, and accepted policies."""
    folder, uri, first = database
    (folder / "report.html").write_text("<p>second</p>")
    key = "manifests/sums/run-1/0002/policy.json"
    accepted = tracking.Model("sums", policy(), key, {"grpo.value": "0.9"})
    records = [record(0, reward=0.25, **{"eval/pass@1": 0.5}), record(1, reward=0.5, kl=0.01)]
    second = tracking.sync(
        context(uri), records=records, settings=SETTINGS, artifacts=[folder / "report.html"], model=accepted,
        deadline=PATIENT,
    )  # fmt: skip
    changed = {"update": {"learning_rate": 2e-6, "loss_type": "dapo"}}
    records.append(record(5, run="run-2", reward=0.75))
    third = tracking.sync(
        context(uri, run="run-2"), records=records, settings=changed, model=accepted, finished=True, deadline=PATIENT
    )
    assert {answer["run_id"] for answer in (first, second, third)} == {first["run_id"]}

    run = client.get_run(first["run_id"])
    assert points(client, run, "reward") == [(0, 0.25), (1, 0.5), (5, 0.75)]
    assert points(client, run, "eval/pass_at_1") == [(0, 0.5)]
    assert client.get_metric_history(run.info.run_id, "kl")[0].timestamp == 1767322860000  # 2026-01-02 03:01 UTC
    params = {"update.learning_rate": "1e-06", "update.loss_type": "dapo", "seed": "3", "model": "base"}
    assert run.data.params == params
    assert run.data.tags["changed.run-2.update.learning_rate"] == "2e-06"
    assert run.data.tags["grpo.fine_tune"] == "sums"
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "tests"
    assert (folder / "mlartifacts" / run.info.run_id / "artifacts" / "report.html").read_text() == "<p>second</p>"

    assert (second["model_version"], third["model_version"]) == ("1", "1")
    champion = client.get_model_version_by_alias("sums", "champion")
    assert champion.run_id == first["run_id"]
    assert champion.tags == {"grpo.value": "0.9", "grpo.digest": policy().digest, "grpo.manifest": key}

    better = tracking.Model("sums", policy(3), key.replace("0002", "0003"))
    fourth = tracking.sync(context(uri), records=[], settings={}, model=better, deadline=PATIENT)
    assert fourth["model_version"] == "2"
    assert str(client.get_model_version_by_alias("sums", "champion").version) == "2"


def points(client, run, metric):
    return [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, metric)]


def test_a_closed_port_costs_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert (
        tracking.sync(context(f"http://u:secret@127.0.0.1:{port}"), records=[record(0, reward=1.0)], settings={})
        is None
    )
    assert "was not told: no connection" in caplog.text
    assert "secret" not in caplog.text


@pytest.fixture
def hanging_server():
    """Accepts connections, answers a byte of a header now and then, and never ends the answer."""
    server = socket.create_server(("127.0.0.1", 0))
    stop, connections = threading.Event(), []

    def trickle(connection):
        while not stop.wait(0.3):
            try:
                connection.sendall(b"x")
            except OSError:
                return

    def accept():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=trickle, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    stop.set()
    server.close()
    for connection in connections:
        connection.close()


def test_a_server_that_hangs_is_left_at_the_deadline(hanging_server, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    began = time.monotonic()
    answer = tracking.sync(context(hanging_server), records=[record(0, reward=1.0)], settings={}, deadline=4.0)
    assert answer is None
    assert "no answer within 4 s" in caplog.text
    assert time.monotonic() - began < 60  # a hang would be for ever, the machine may be slow


def test_a_store_that_mlflow_refuses_costs_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    (tmp_path / "mlflow.db").write_text("this is no database, and long enough to be read as one" * 20)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.sync(context(uri), records=[], settings={}, deadline=PATIENT) is None
    assert "was not told" in caplog.text
    assert "file is not a database" in caplog.text


def test_where_it_goes(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(context("")) == "sqlite:///runs/mlflow.db"
    assert tracking.is_local(context(""))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.tracking_uri(context("")) == "http://mlflow:5000"
    assert not tracking.is_local(context(""))
    assert tracking.tracking_uri(context("sqlite:///x.db")) == "sqlite:///x.db"


def test_switched_off_it_touches_nothing(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.sync(context(uri, enabled=False), records=[], settings={}) is None
    assert list(tmp_path.iterdir()) == []


def test_settings_become_dotted_params():
    nested = {"a": {"b": {"c": 1}, "on": True}, "list": [{"name": "x"}], "text": "y", "none": None, "empty": {}}
    assert tracking.flatten(nested) == {
        "a.b.c": "1",
        "a.on": "true",
        "list": '[{"name": "x"}]',
        "text": "y",
        "empty": "{}",
    }

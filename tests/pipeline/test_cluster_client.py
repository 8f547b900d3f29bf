"""The client side of a cluster, against a server that speaks its calls: submit, chain, follow, cancel, schedule."""

import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from kubernetes import client as kubernetes_client

sys.path.insert(0, str(Path(__file__).parent))

from cluster_server import Cluster, task_details, write_kubeconfig

from components.common import kube, podlog
from components.common.errors import SettingsError
from components.common.settings import validate
from pipeline import following, submitting
from pipeline.chain import go_on
from pipeline.compiling import iterations_that_fit
from pipeline.connection import ClusterError, Connection, call
from pipeline.following import Pods, cancel, follow, tasks_of
from pipeline.scaffold import write_start
from pipeline.scheduling import schedule, schedules, six_fields, unschedule
from pipeline.settings import PipelineSettings
from pipeline.submitting import resumed, runs, settings_of, start, submit, upload

STAGES = ("configure", "dataset", "rollout", "reward", "update", "evaluate", "publish")
OUT_OF_REACH = "s3://bucket?endpoint=http://127.0.0.1:9"
MAIN = {"name": "main", "image": "registry/it:1", "imageID": "", "ready": False, "restartCount": 0}
KILLED = MAIN | {"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(kube, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH", raising=False)
    found = Cluster()
    yield found
    found.close()


@pytest.fixture
def client(cluster):
    return Connection(host=cluster.url).open()


@pytest.fixture
def pods(cluster, monkeypatch):
    settings = kubernetes_client.Configuration()
    settings.host = cluster.url
    settings.retries = False
    monkeypatch.setattr(kubernetes_client.Configuration, "_default", settings)
    return Pods("kubeflow")


@pytest.fixture
def kubeconfig(cluster, monkeypatch, tmp_path):
    """The way to the cluster that `kubectl` has."""
    write_kubeconfig(cluster, tmp_path, monkeypatch)


def settings(**changes):
    values = {
        "fine_tune": "f", "model": "org/model", "store": "s3://bucket", "iterations": 2,
        "dataset": {"source": "gsm8k"},
        "cluster": {stage: {"image": f"registry.example/{stage}@sha256:{'0' * 64}"} for stage in STAGES},
    }  # fmt: skip
    return validate(PipelineSettings, values | changes)


def test_submitting_uploads_a_version_and_starts_a_run(cluster, client):
    sent = submit(client, settings())
    run = cluster.runs[sent.run_id]
    assert run["display_name"].startswith("f-") and sent.url.endswith(f"/#/runs/details/{sent.run_id}")
    version = cluster.versions[run["pipeline_version_reference"]["pipeline_version_id"]]
    assert version["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "grpo-f"
    assert [found.run_id for found in runs(client, "f")] == [sent.run_id] and runs(client, "other") == []


def test_the_same_graph_is_one_version(cluster, client):
    first, second = upload(client, settings()), upload(client, settings())
    other = upload(client, settings(iterations=3))
    assert first.version_id == second.version_id != other.version_id
    assert first.pipeline_id == other.pipeline_id
    assert cluster.counted("POST", "upload_version") == 2  # the first upload's own version has the pipeline's name


def test_a_second_run_of_a_fine_tune_is_refused_while_the_first_goes_on(cluster, client):
    sent = submit(client, settings())
    with pytest.raises(ClusterError, match=f"grpo cancel {sent.run_id}"):
        submit(client, settings())
    cluster.runs[sent.run_id]["state"] = "SUCCEEDED"
    submit(client, settings())


def test_of_two_runs_submitted_at_the_same_moment_the_one_that_sees_the_other_is_ended(cluster, client, monkeypatch):
    """The second begins and starts between the first's look and its start, in the same second."""
    begun = []

    def slowly(*arguments):
        if not begun:
            begun.append(True)
            begun.append(submit(client, settings(iterations=3)))
        return upload(*arguments)

    monkeypatch.setattr(submitting, "upload", slowly)
    with pytest.raises(ClusterError, match="at the same moment"):
        submit(client, settings())
    first = begun[1].run_id
    assert len(cluster.runs) == 2 and cluster.runs[first]["state"] == "RUNNING"
    assert [run["state"] for name, run in cluster.runs.items() if name != first] == ["CANCELED"]


@pytest.mark.parametrize("fails", ["looking", "ending"])
def test_what_goes_on_is_told_when_the_server_breaks_after_a_start(cluster, client, monkeypatch, caplog, fails):
    def then_broken(*arguments):
        found = upload(*arguments)
        if fails == "ending":
            cluster.runs["other"] = {"run_id": "other", "display_name": "f-other", "state": "RUNNING",
                                     "experiment_id": found.experiment_id}  # fmt: skip
            cluster.faults[":terminate"] = [503] * 9
        return found

    def started(*arguments):
        sent = start(*arguments)
        if fails == "looking":
            cluster.faults["GET", "/experiments"] = [503] * 9
        return sent

    monkeypatch.setattr(submitting, "upload", then_broken)
    monkeypatch.setattr(submitting, "start", started)
    if fails == "looking":
        sent = submit(client, settings())
        assert f"{sent.name} goes on" in caplog.text
    else:
        with pytest.raises(ClusterError, match=r"f-other .* both go on; stop this one with `grpo cancel"):
            submit(client, settings())


@pytest.mark.parametrize("statuses", [[500, 503, 429], ["drop"], [429, "drop", 500]])
def test_a_busy_or_broken_server_is_asked_again(cluster, client, statuses):
    cluster.faults["/experiments"] = list(statuses)
    call("make the experiment", client.create_experiment, "grpo-f")
    assert cluster.faults["/experiments"] == [] and len(cluster.experiments) == 1


@pytest.mark.parametrize(
    ("status", "words"), [(401, "expired"), (403, "grpo doctor"), (404, "--namespace"), (409, "already")]
)
def test_a_refusal_says_how_to_mend_it(cluster, client, status, words):
    cluster.faults["/runs"] = [status] * 9
    with pytest.raises(ClusterError, match=words):
        call("read the run", client.get_run, "some-run")
    assert cluster.counted("GET", "/runs") == 1  # asking again would not help


def test_a_server_that_stays_broken_is_given_up(cluster, client):
    cluster.faults["/pipelines"] = [500] * 99
    with pytest.raises(ClusterError, match="ml-pipeline"):
        call("look up the pipeline", client.get_pipeline_id, "grpo-f")
    assert cluster.counted("GET", "/pipelines") == kube.ATTEMPTS


def test_an_expired_token_and_an_unreachable_host(cluster):
    cluster.token = "good"
    Connection(host=cluster.url, token="good").open()
    with pytest.raises(ClusterError, match="expired"):
        client = Connection(host=cluster.url, token="old").open()
        runs(client, "f")
    with pytest.raises(ClusterError, match="--host"):
        client = Connection(host="http://127.0.0.1:9").open()
        runs(client, "f")


def test_the_runs_namespace_is_not_where_kubeflow_is_looked_for(cluster, monkeypatch, kubeconfig):
    client = Connection(namespace="team-a").open()
    assert runs(client, "f") == []
    assert cluster.counted("GET", "/apis/v2beta1/experiments") == 1  # through kubeflow's service, not team-a's


def test_a_dex_session(cluster):
    cluster.cookie = "authservice_session=good"
    assert runs(Connection(host=cluster.url, cookie="authservice_session=good").open(), "f") == []
    with pytest.raises(ClusterError, match="--cookie"):
        runs(Connection(host=cluster.url, cookie="authservice_session=old").open(), "f")


def test_a_pods_own_token_is_read_anew_when_it_was_rotated(cluster, monkeypatch, tmp_path):
    token = tmp_path / "token"
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    for text in ("first", "second"):
        token.write_text(text)
        cluster.token = text
        if text == "first":
            client = Connection(host=cluster.url).open()
        assert runs(client, "f") == []


def test_what_only_this_machine_has_is_refused(client):
    with pytest.raises(SettingsError, match="a pod cannot see"):
        submit(client, settings(store="file:///tmp/x"))


def test_a_long_fine_tune_becomes_a_chain(cluster, client, monkeypatch):
    fit = iterations_that_fit(settings())
    sent = submit(client, settings(iterations=2 * fit + 1))
    seen = []
    for _ in range(3):
        run = cluster.runs[sent.run_id if not seen else seen[-1][0]]
        version = cluster.versions[run["pipeline_version_reference"]["pipeline_version_id"]]
        tasks = version["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]
        constants = {name: task["inputs"]["parameters"] for name, task in tasks.items() if name == "submit-next"}
        base = json.loads(tasks["configure"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"])
        remaining = int(constants["submit-next"]["remaining"]["runtimeValue"]["constant"]) if constants else 0
        seen.append((run["run_id"], base["iterations"], remaining, base["start_from"], base["start_run"]))
        if not remaining:
            break
        cluster.runs[seen[-1][0]]["state"] = "SUCCEEDED"
        monkeypatch.setattr("pipeline.chain.connect", lambda: client)
        resolved = json.dumps({name: value for name, value in base.items() if name != "cluster"})
        seen[-1] = (go_on(resolved, json.dumps(base["cluster"]), remaining, *[run["run_id"]] * 2), *seen[-1][1:])
    first, second = sent.run_id, seen[0][0]
    assert [entry[1:] for entry in seen] == [
        (fit, fit + 1, "base", None), (fit, 1, "latest", first), (1, 0, "latest", second),
    ]  # fmt: skip
    assert settings_of(client, runs(client, "f")[-1]).iterations == 2 * fit + 1


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("status", [504, "drop"])
@pytest.mark.parametrize("path", ["/pipelines/upload", "/pipelines/upload_version", "/experiments", "/v2beta1/runs"])
def test_an_answer_that_is_lost_makes_nothing_twice(cluster, client, path, status, fault):
    (cluster.faults if fault == "before" else cluster.lost)[("POST", path)] = [status]
    sent = submit(client, settings())
    assert list(cluster.runs) == [sent.run_id]
    assert (len(cluster.pipelines), len(cluster.versions), len(cluster.experiments)) == (1, 2, 1)
    assert not cluster.faults.get(("POST", path)) and not cluster.lost.get(("POST", path))


@pytest.mark.parametrize("status", [504, "drop"])
def test_a_schedule_whose_answer_is_lost_is_made_once(cluster, client, status):
    cluster.lost[("POST", "/recurringruns")] = [status]
    made = schedule(client, settings(), "0 3 * * *", None)
    assert list(cluster.recurring) == [made.id] and cluster.lost == {("POST", "/recurringruns"): []}


def test_the_last_task_of_a_run_done_again_submits_nothing_new(cluster, client, monkeypatch):
    monkeypatch.setattr("pipeline.chain.connect", lambda: client)
    values = json.loads(settings(iterations=30).model_dump_json())
    section = json.dumps(values.pop("cluster"))
    job = submit(client, settings()).run_id
    again = [go_on(json.dumps(values), section, 5, "Run-7", job) for _ in range(2)]
    assert list(cluster.runs) == [job, again[0]] and again[0] == again[1]
    run = cluster.runs[again[0]]
    assert run["display_name"] == "f-after-run-7" and settings_of(client, runs(client, "f")[0]).start_run == "run-7"
    assert go_on(json.dumps(values), section, 5, "run-8", job) != again[0]


def test_pods_that_the_form_changed_stay_so_in_the_chain_and_at_a_resume(cluster, client, monkeypatch):
    """A run started in the UI with more memory and on another pool; preset and type no longer say where it goes."""
    monkeypatch.setattr("pipeline.chain.connect", lambda: client)
    asked = settings(iterations=30)
    sent = submit(client, asked)
    cluster.runs[sent.run_id]["runtime_config"] = {"parameters": {
        "update_pod_memory": "512Gi", "update_pod_gpus": "4", "update_pod_node_selector": {"pool": "b"},
        "update_learning_rate": 3e-6,
    }}  # fmt: skip
    (found,) = runs(client, "f")
    pod = settings_of(client, found).cluster.update
    assert (pod.memory, pod.gpus, pod.node_selector, pod.gpu_type, pod.cpu) == (
        "512Gi", 4, {"pool": "b"}, None, asked.cluster.update.cpu,
    )  # fmt: skip
    values = json.loads(asked.model_dump_json())
    section = json.dumps(values.pop("cluster"))
    following = go_on(json.dumps(values), section, 5, sent.run_id, sent.run_id)
    (found,) = [run for run in runs(client, "f") if run.run_id == following]
    assert settings_of(client, found).cluster.update == pod
    assert settings_of(client, found).cluster.rollout == asked.cluster.rollout


def test_a_run_and_a_schedule_of_one_fine_tune_refuse_each_other(cluster, client):
    sent = submit(client, settings())
    with pytest.raises(ClusterError, match=f"grpo cancel {sent.run_id}"):
        schedule(client, settings(), "0 3 * * *", None)
    assert not cluster.recurring
    cluster.runs[sent.run_id]["state"] = "FAILED"
    made = schedule(client, settings(), "0 3 * * *", None)
    with pytest.raises(ClusterError, match="grpo unschedule f"):
        submit(client, settings())
    assert len(cluster.runs) == 1
    cluster.recurring[made.id]["status"] = "DISABLED"
    submit(client, settings())


def test_resuming_does_what_remains(cluster, client, tmp_path):
    from components.common.manifest import Manifest, manifest_key
    from components.common.store import open_store

    submit(client, settings(iterations=5))
    (run,) = cluster.runs.values()
    spec = cluster.versions[run["pipeline_version_reference"]["pipeline_version_id"]]["pipeline_spec"]
    constant = spec["pipeline_spec"]["root"]["dag"]["tasks"]["configure"]["inputs"]["parameters"]["settings"]
    store = open_store((tmp_path / "store").as_uri())
    text = constant["runtimeValue"]["constant"].replace('"s3://bucket"', f'"{store.url}"')
    constant["runtimeValue"]["constant"] = text
    run["runtime_config"] = {"parameters": {"update_learning_rate": 3e-5}}
    again = resumed(client, "f")
    assert (again.iterations, again.start_from, again.update.learning_rate) == (5, "base", 3e-5)
    empty = Manifest.model_validate({
        "kind": "policy", "digest": "",
        "producer": {"stage": "s", "key": "", "settings_digest": "", "code_version": ""},
        "fine_tune": "f", "run": run["run_id"], "created": datetime.now(UTC), "store": store.url,
    })  # fmt: skip
    for iteration in (0, 1, 2):
        store.put_bytes(empty.dump(), manifest_key("f", run["run_id"], iteration, "policy"))
    again = resumed(client, "f")
    assert (again.iterations, again.start_from, again.start_run) == (3, "latest", run["run_id"])
    run["runtime_config"]["parameters"]["run"] = "Mine"  # what configure calls it
    assert resumed(client, "f").start_from == "base"
    store.put_bytes(empty.dump(), manifest_key("f", "mine", 0, "policy"))
    again = resumed(client, "f")
    assert (again.iterations, again.start_from, again.start_run) == (5, "latest", "mine")
    with pytest.raises(ClusterError, match="no run to go on with"):
        resumed(client, "other")


def test_a_chain_trains_on_though_its_own_champion_has_seen_the_data(cluster, client, monkeypatch):
    """The first run ends early when nothing is new; those after it have something to go on with."""
    monkeypatch.setattr("pipeline.chain.connect", lambda: client)
    asked = settings(iterations=30, skip_unchanged_data=True)
    sent = submit(client, asked)
    assert settings_of(client, runs(client, "f")[0]).iterations == 30  # what remains is told inside the condition
    values = json.loads(asked.model_dump_json())
    section = json.dumps(values.pop("cluster"))
    following = go_on(json.dumps(values), section, 5, sent.run_id, sent.run_id)
    (found,) = [run for run in runs(client, "f") if run.run_id == following]
    assert (settings_of(client, found).iterations, settings_of(client, found).skip_unchanged_data) == (5, False)


def test_a_resumed_fine_tune_takes_overrides(cluster, client):
    sent = submit(client, settings(iterations=5, store=OUT_OF_REACH, skip_unchanged_data=True))
    run = cluster.runs[sent.run_id]
    run["state"] = "FAILED"
    run["run_details"] = task_details(configure="SUCCEEDED", update="SUCCEEDED")
    again = resumed(client, "f", overrides=["update.learning_rate=3e-5", "cluster.update.memory=96Gi"])
    assert (again.iterations, again.update.learning_rate, again.cluster.update.memory) == (4, 3e-5, "96Gi")
    assert (again.start_run, again.skip_unchanged_data) == (sent.run_id, False)
    assert resumed(client, "f", overrides=["iterations=7"]).iterations == 7
    with pytest.raises(SettingsError, match=r"update\.learning_rte is not a setting; did you mean"):
        resumed(client, "f", overrides=["update.learning_rte=3e-5"])
    with pytest.raises(SettingsError, match="--resume keeps model, start_from: submit a settings file"):
        resumed(client, "f", overrides=["model=org/other", "start_from=base"])


def test_a_fine_tune_that_had_its_iterations_says_how_to_end_it_or_to_go_on(cluster, client):
    sent = submit(client, settings(iterations=1, store=OUT_OF_REACH))
    cluster.runs[sent.run_id] |= {
        "state": "FAILED", "run_details": task_details(configure="SUCCEEDED", update="SUCCEEDED", rollout_2="FAILED"),
    }  # fmt: skip
    with pytest.raises(SettingsError, match=rf"\*Retry\* finishes it \(.*{sent.run_id}\); --set iterations=N adds"):
        resumed(client, "f")
    again = resumed(client, "f", overrides=["iterations=2"])
    assert (again.iterations, again.start_from, again.start_run) == (2, "latest", sent.run_id)


def test_a_run_whose_form_was_wrong_is_no_traceback(cluster, client):
    sent = submit(client, settings())
    cluster.runs[sent.run_id] |= {
        "state": "FAILED", "runtime_config": {"parameters": {"rollout_pod_memory": "lots"}},
    }  # fmt: skip
    with pytest.raises(SettingsError, match=r"cluster\.rollout: 1 problem\n +memory: .*got 'lots'"):
        resumed(client, "f")


def test_resuming_counts_the_updates_where_the_store_is_out_of_reach(cluster, client):
    sent = submit(client, settings(iterations=5, store=OUT_OF_REACH))
    run = cluster.runs[sent.run_id]
    run["state"] = "FAILED"
    assert (resumed(client, "f").iterations, resumed(client, "f").start_from) == (5, "base")
    run["run_details"] = task_details(
        configure="SUCCEEDED", update="SUCCEEDED", update_2="SUCCEEDED", update_3="FAILED"
    )
    again = resumed(client, "f")
    assert (again.iterations, again.start_from, again.start_run) == (3, "latest", sent.run_id)


def test_following_shows_our_tasks_until_the_end(cluster, client):
    sent = submit(client, settings())
    run = cluster.runs[sent.run_id]
    run["run_details"] = task_details(configure="SUCCEEDED", rollout="SUCCEEDED", update="SUCCEEDED", update_2="FAILED")
    states = []
    for found, tasks in follow(client, sent.run_id, poll_seconds=0):
        states.append([(task.name, task.stage, task.iteration, task.state) for task in tasks])
        run["state"] = "FAILED"
        assert tasks == tasks_of(found)
    assert states == [[
        ("configure", "configure", None, "SUCCEEDED"), ("rollout 0", "rollout", 0, "SUCCEEDED"),
        ("update 0", "update", 0, "SUCCEEDED"), ("update 1", "update", 1, "FAILED"),
    ]] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("update-2", "update 1"), ("update 1", "update 1"), ("reward-shards", "reward 0"), ("rollout-11", "rollout 10"),
        ("reward-shards-3", "reward 2"), ("submit-next", "submit next"), ("publish", "publish"), ("executor", None),
        ("executor(0)", None), ("update-2-driver", None), ("update-2-driver(0)", None), ("for-loop-2", None),
        ("condition-1", None), ("data has changed", None),
    ],
)  # fmt: skip
def test_a_task_by_its_key_or_by_its_name(reported, name):
    detail = SimpleNamespace(display_name=reported, state="RUNNING", error=None, start_time=None, create_time=None,
                             end_time=None)  # fmt: skip
    run = SimpleNamespace(run_details=SimpleNamespace(task_details=[detail]))
    assert [task.name for task in tasks_of(run)] == ([name] if name else [])


def test_the_members_of_a_loop_are_one_task_as_bad_as_its_worst(cluster, client):
    sent = submit(client, settings())
    states = ("SUCCEEDED", "FAILED", "RUNNING")
    cluster.runs[sent.run_id]["run_details"] = {"task_details": [
        {"display_name": "rollout-2", "state": state} for state in states
    ]}  # fmt: skip
    (task,) = tasks_of(client.get_run(sent.run_id))
    assert (task.name, task.state) == ("rollout 1", "FAILED")


def pod(name, stage="update", run="r", **status):
    labels = {"pipeline/runid": run, "app.kubernetes.io/component": stage}
    metadata = {"name": name, "namespace": "kubeflow", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"metadata": metadata, "spec": {"containers": []}, "status": status}


def test_the_log_of_a_stage(cluster, pods):
    cluster.pods = [pod("one"), pod("other", stage="reward")]
    cluster.logs["one"] = "first\nsecond\nthird"
    assert list(pods.log("r", "update")) == ["first", "second", "third"]
    assert list(pods.log("r", "update", tail=1)) == ["third"]
    with pytest.raises(ClusterError, match="no pod of rollout left"):
        list(pods.log("r", "rollout"))


def test_a_log_is_followed_from_before_the_pod_runs_over_a_broken_connection_to_its_end(cluster, pods, monkeypatch):
    monkeypatch.setattr(following, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(podlog, "RECONNECT_SECONDS", 0.02)
    full = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu"}
    cluster.pods, written = [pod("one", phase="Pending", conditions=[full])], []
    cluster.logs["one"] = lambda: ("\n".join(written), len(written) < 4)
    cluster.cuts["one"] = [60]
    followed = pods.log_as_it_grows("r", "update")
    assert "cpu is short" in next(followed)
    written += ["first", "second"]
    cluster.pods = [pod("one", phase="Running")]
    assert [next(followed), next(followed)] == ["first", "second"]
    written += ["third", "fourth"]
    cluster.pods = [pod("one", phase="Failed", containerStatuses=[KILLED])]
    assert list(followed) == ["third", "fourth", "(main was killed for memory: raise cluster.update.memory)"]


@pytest.mark.parametrize(
    ("statuses", "shown"),
    [([503, 503], "first"), ([503] * 9, "the server failed"), (["drop"], "first"), ([404], "HTTP 404, not found")],
)
def test_the_end_of_a_log_is_asked_for_again_and_told_when_it_is_not_to_be_had(
    cluster, pods, monkeypatch, statuses, shown
):
    monkeypatch.setattr(podlog, "RECONNECT_SECONDS", 0.02)
    cluster.pods, cluster.logs["one"] = [pod("one", phase="Succeeded")], "first"
    cluster.faults["/log"] = statuses
    (line,) = pods.log_as_it_grows("r", "update")
    assert shown in line


def test_a_pod_that_goes_before_it_runs_is_told(cluster, pods, monkeypatch):
    monkeypatch.setattr(following, "POLL_SECONDS", 0.02)
    cluster.pods = [pod("one", phase="Pending")]
    followed = pods.log_as_it_grows("r", "update")
    threading.Timer(0.3, cluster.pods.clear).start()
    assert list(followed) == ["(pod one is gone)"]


@pytest.mark.parametrize("limit", [60, 0])
def test_a_log_is_followed_through_an_outage_of_the_server(cluster, pods, monkeypatch, limit):
    monkeypatch.setattr(following, "OUTAGE_SECONDS", limit)
    monkeypatch.setattr(podlog, "RECONNECT_SECONDS", 0.02)
    cluster.pods, cluster.logs["one"] = [pod("one", phase="Running")], lambda: ("first\nsecond", True)
    cluster.cuts["one"] = [40]
    followed = pods.log_as_it_grows("r", "update")
    assert next(followed) == "first"
    cluster.logs["one"] = "first\nsecond"
    cluster.faults["GET", "/pods"] = [503] * (2 * kube.ATTEMPTS)
    if limit:
        threading.Timer(1.0, lambda: cluster.pods.__setitem__(0, pod("one", phase="Succeeded"))).start()
        assert list(followed) == ["second"]
    else:
        with pytest.raises(ClusterError, match="list the pods"):
            list(followed)


def test_a_log_that_may_not_be_followed_says_so(cluster, pods):
    cluster.pods, cluster.logs["one"] = [pod("one", phase="Running")], "first"
    cluster.faults["/log"] = [403]
    with pytest.raises(ClusterError, match="grpo doctor"):
        list(pods.log_as_it_grows("r", "update"))


def test_a_pod_that_does_not_run_says_why(cluster, pods):
    taint = "0/3 nodes are available: 3 node(s) had untolerated taint {nvidia.com/gpu: present}"
    cluster.pods = [pod("one", conditions=[{"type": "PodScheduled", "status": "False", "message": taint}])]
    text = "\n".join(pods.log("r", "update"))
    assert taint in text and "has no log" in text
    cluster.pods = [
        pod("two", containerStatuses=[MAIN | {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "x"}}}])
    ]
    assert "ImagePullBackOff: x (image registry/it:1:" in "\n".join(pods.log("r", "update"))
    cluster.pods = [pod("three", containerStatuses=[KILLED])]
    assert "raise cluster.update.memory" in "\n".join(pods.log("r", "update"))


def test_a_stage_that_is_none_is_named(pods):
    with pytest.raises(SettingsError, match="no stage updat; did you mean update"):
        list(pods.log("r", "updat"))


def test_cancelling_ends_the_run_and_its_train_jobs(cluster, client, pods):
    sent = submit(client, settings())
    for name, run in (("mine", sent.run_id), ("other", "x")):
        cluster.train_jobs[name] = {"metadata": {"name": name, "labels": {"grpo-pipeline/run": run}}}
    cancel(client, sent.run_id)
    assert pods.delete_train_jobs(sent.run_id) == ["mine"]
    assert cluster.runs[sent.run_id]["state"] == "CANCELED" and set(cluster.train_jobs) == {"other"}
    cancel(client, sent.run_id)
    assert pods.delete_train_jobs(sent.run_id) == [] and cluster.counted("POST", ":terminate") == 1
    with pytest.raises(ClusterError, match="not found"):
        cancel(client, "nothing")


@pytest.mark.parametrize("way", ["no kubeconfig", "forbidden"])
def test_the_run_is_cancelled_where_train_jobs_may_not_be_looked_at(cluster, monkeypatch, tmp_path, way):
    from typer.testing import CliRunner

    from pipeline.cli import app

    write_kubeconfig(cluster, tmp_path, monkeypatch)
    if way == "forbidden":
        cluster.faults["/trainjobs"] = [403]
    else:
        (tmp_path / "kubeconfig").unlink()
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    cluster.runs["r"] = {"run_id": "r", "state": "RUNNING"}
    result = CliRunner().invoke(app, ["cancel", "r", "--host", cluster.url])
    assert result.exit_code == 0 and cluster.runs["r"]["state"] == "CANCELED", result.output
    assert "run r is ended" in result.output and "janitor" in result.output


def test_a_schedule_never_catches_up_and_runs_one_at_a_time(cluster, client):
    made = schedule(client, settings(), "30 3 * * 1-5", None)
    (recurring,) = cluster.recurring.values()
    assert recurring["trigger"]["cron_schedule"]["cron"] == "0 30 3 * * 1-5" == made.cron
    assert recurring["no_catchup"] is True and str(recurring["max_concurrency"]) == "1"
    version = cluster.versions[recurring["pipeline_version_reference"]["pipeline_version_id"]]
    text = json.dumps(version["pipeline_spec"]).replace("\\", "")
    assert '"start_from":"champion"' in text and '"skip_unchanged_data":true' in text
    assert [found.name for found in schedules(client)] == ["grpo-f"]
    with pytest.raises(ClusterError, match="recurs already"):
        schedule(client, settings(), "0 1 * * *", None)
    assert [found.id for found in unschedule(client, "f")] == [made.id] and cluster.recurring == {}
    with pytest.raises(ClusterError, match="no schedule"):
        unschedule(client, "f")


def test_a_schedule_is_one_run(client):
    with pytest.raises(SettingsError, match="lower them to"):
        schedule(client, settings(iterations=500), "0 3 * * *", None)


def grpo(*arguments, **environment):
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_the_commands_reach_the_cluster_they_are_told(cluster, tmp_path):
    write_start(tmp_path / "mine")
    changes = ["store=s3://bucket", "dataset.source=gsm8k", 'reward.functions=[{name="numeric_match"}]', "fine_tune=f"]
    changes += [f"cluster.{stage}.image=registry.example/{stage}@sha256:{'0' * 64}" for stage in STAGES]
    options = [str(tmp_path / "mine" / "settings.toml"), *(part for change in changes for part in ("--set", change))]
    sent = grpo("submit", *options, GRPO_HOST=cluster.url)
    assert sent.returncode == 0, sent.stderr
    (run,) = cluster.runs.values()
    assert len(sent.stdout.splitlines()) == 2, sent.stdout  # the client library's own lines are not shown
    assert "8 iterations" in sent.stdout and f"{cluster.url}/#/runs/details/{run['run_id']}" in sent.stdout
    assert run["run_id"] in grpo("status", "f", "--host", cluster.url).stdout
    again = grpo("submit", *options, GRPO_HOST=cluster.url)
    assert again.returncode == 1 and "going on" in again.stderr and "Traceback" not in again.stderr
    run["state"] = "FAILED"
    changed = ["--set", "update.learning_rate=9e-9", "--set", "store=s3://other"]
    kept = grpo("submit", "--resume", "f", *changed, GRPO_HOST=cluster.url)
    assert kept.returncode == 1 and "--resume keeps store" in kept.stderr and len(cluster.runs) == 1
    run["state"] = "SUCCEEDED"
    assert grpo("schedule", *options, "--cron", "0 3 * * *", GRPO_HOST=cluster.url).returncode == 0
    assert "0 0 3 * * *" in grpo("schedules", GRPO_HOST=cluster.url).stdout
    assert grpo("unschedule", "f", GRPO_HOST=cluster.url).returncode == 0 and not cluster.recurring


WINTER, SUMMER = datetime(2026, 1, 15, tzinfo=UTC), datetime(2026, 7, 15, tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "timezone", "at", "wanted"),
    [
        ("0 3 * * *", None, WINTER, "0 0 3 * * *"),
        ("*/15 * * * 7", None, WINTER, "0 */15 * * * 0"),
        ("0 3 * * 5-7", None, WINTER, "0 0 3 * * 5,6,0"),
        ("0 3 * * 1-7/3", None, WINTER, "0 0 3 * * 1,4,0"),
        ("0 3 * * 0-7", None, WINTER, "0 0 3 * * 0,1,2,3,4,5,6,0"),
        ("0 3 * * 1,7", "Europe/Berlin", WINTER, "0 0 2 * * 1,0"),
        ("0 3 * * */7", None, WINTER, "0 0 3 * * */7"),
        ("0 3 17 7 *", None, WINTER, "0 0 3 17 7 *"),
        ("0-30/10,45 3 * * *", None, WINTER, "0 0-30/10,45 3 * * *"),
        ("0 3 * * *", "Europe/Berlin", WINTER, "0 0 2 * * *"),
        ("0 3 * * *", "Europe/Berlin", SUMMER, "0 0 1 * * *"),
        ("0 1 * * 1", "Europe/Berlin", SUMMER, "0 0 23 * * 0"),
        ("30 22 * * 6", "America/New_York", WINTER, "0 30 3 * * 0"),
        ("15 9 * * *", "Asia/Kolkata", WINTER, "0 45 3 * * *"),
        ("*/5 * * * *", "UTC", WINTER, "0 */5 * * * *"),
    ],
)
def test_cron_in_a_time_zone(cron, timezone, at, wanted):
    assert six_fields(cron, timezone, at=at) == wanted


@pytest.mark.parametrize(
    ("cron", "timezone", "words"),
    [
        ("0 3 * *", None, "five fields"),
        ("61 3 * * *", None, "minute wants 0-59"),
        ("0 24 * * *", None, "hour wants 0-23"),
        ("0 x * * *", None, "hour wants"),
        ("*/0 3 * * *", None, "steps of at least 1"),
        ("0 3 * * 5-1", None, "upwards"),
        ("30-0 3 * * *", None, "upwards"),
        ("0 3 0 * *", None, "day of month wants 1-31"),
        ("0 3 * * 8", None, "day of week wants 0-7"),
        ("0, 3 * * *", None, "minute wants"),
        ("0 3 * * *", "Mars/Olympus", "no zone"),
        ("0 */2 * * *", "Europe/Berlin", "in UTC"),
        ("0 0 1 * *", "Europe/Berlin", "another day"),
        ("0 0 * * 1-5", "Europe/Berlin", "weekdays"),
    ],
)
def test_a_cron_that_cannot_be_kept_is_refused(cron, timezone, words):
    with pytest.raises(SettingsError, match=words):
        six_fields(cron, timezone, at=SUMMER)

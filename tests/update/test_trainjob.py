"""Several nodes: the TrainJob, against a server that speaks the Kubernetes calls; its nodes are real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml
from engine_case import ROOT

sys.path.insert(0, str(ROOT / "tests" / "pipeline"))

from cluster_server import Cluster
from kubernetes import client as kubernetes_client

from components.common import kube, podlog
from components.common.errors import StageError
from components.common.kube import ClusterError
from components.common.manifest import Manifest
from components.common.podlog import PodLog
from components.common.settings import validate
from components.update import cluster as place
from components.update import trainjob
from components.update.cluster import Here
from components.update.config import UpdateSettings
from components.update.jobspec import NodeResources, describe, job_name
from components.update.trainjob import TrainJob
from pipeline.resources import ClusterSettings, following
from tests.ports import held_port

NODE = {"image": "registry.example/update@sha256:" + "0" * 64, "cpu": "1", "memory": "1Gi"}
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "grpo-f-abc", "uid": "uid-1"}
RUN = "0b9f"


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(kube, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.03)
    monkeypatch.setattr(podlog, "RECONNECT_SECONDS", 0.05)
    found = Cluster()
    found.workflows["grpo-f-abc"] = {"metadata": {"uid": "uid-1"}, "spec": {}, "status": {"phase": "Running"}}
    yield found
    found.close()


@pytest.fixture
def here(cluster):
    settings = kubernetes_client.Configuration()
    settings.host, settings.retries = cluster.url, False
    api = kubernetes_client.ApiClient(settings)
    return Here(kubernetes_client.CoreV1Api(api), kubernetes_client.CustomObjectsApi(api), "kubeflow", RUN, dict(OWNER))


def body(name="grpo-f-0-1"):
    return {"metadata": {"name": name, "labels": {}}, "spec": {"trainer": {"numNodes": 2}}}


def end(job, kind="Complete", **more):
    condition = {"type": kind, "status": "True", "reason": "JobsFinished", "message": ""} | more
    job["status"] = {"conditions": [condition]}


def node(number, phase="Running", job="grpo-f-0-1", **status):
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job, "batch.kubernetes.io/job-completion-index": str(number),
        "app.kubernetes.io/component": "update-node",
    }  # fmt: skip
    metadata = {"name": f"{job}-node-0-{number}", "namespace": "kubeflow", "labels": labels}
    return {"metadata": metadata, "status": {"phase": phase} | status}


def soon(action, seconds=0.3):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_a_job_is_made_followed_and_deleted(cluster, here):
    cluster.on_train_job = lambda job: soon(lambda: end(job))
    TrainJob(here, body()).carry_out(60)
    assert cluster.train_jobs == {}
    assert [verb for verb, path in cluster.requests if "trainjobs" in path and verb != "GET"] == ["POST", "DELETE"]


@pytest.mark.parametrize("faults", [[500, 503, 429, "drop"], ["drop"] * 12, [500] * 12])
def test_a_failing_api_server_does_not_end_the_job(cluster, here, faults):
    """Twelve failures are more than one call's five attempts: the job runs on without the API server."""
    cluster.on_train_job = lambda job: cluster.faults.update({"/trainjobs/": list(faults)}) or end(job)
    TrainJob(here, body()).carry_out(60)
    assert cluster.faults["/trainjobs/"] == [] and cluster.train_jobs == {}


def test_an_outage_that_lasts_is_given_up(cluster, here, monkeypatch):
    monkeypatch.setattr(trainjob, "OUTAGE_SECONDS", 0.2)
    cluster.on_train_job = lambda job: cluster.faults.update({"/trainjobs/": [500] * 999})
    with pytest.raises(ClusterError, match="HTTP 500"):
        TrainJob(here, body()).carry_out(60)


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "expired"), (403, "grpo doctor"), (404, "k8s/third-party/trainer")],
)
def test_a_refused_job_says_how_to_mend_it(cluster, here, status, words):
    cluster.faults["/trainjobs"] = [status]
    with pytest.raises((ClusterError, StageError), match=words):
        TrainJob(here, body()).carry_out(60)


def test_a_used_up_quota_is_not_called_a_missing_right(cluster, here):
    cluster.on_train_job = lambda job: None
    told = "trainjobs is forbidden: exceeded quota: grpo-gpus, requested: count/trainjobs=1, used: 4, limited: 4"
    cluster.faults["/trainjobs"] = [(403, {"message": told})]
    with pytest.raises(ClusterError, match=r"ResourceQuota is used up.*limited: 4"):
        TrainJob(here, body()).carry_out(60)


def test_a_task_started_again_finds_its_job(cluster, here):
    cluster.train_jobs["grpo-f-0-1"] = job = body()
    soon(lambda: end(job))
    TrainJob(here, body()).carry_out(60)
    assert cluster.counted("POST", "trainjobs") == 1, "asked once, told that it is there, and no second job"


def test_a_failed_job_of_an_earlier_attempt_is_replaced(cluster, here):
    cluster.train_jobs["grpo-f-0-1"] = old = body()
    end(old, "Failed")
    cluster.on_train_job = end
    TrainJob(here, body()).carry_out(60)
    assert cluster.counted("POST", "trainjobs") == 2 and cluster.counted("DELETE", "trainjobs") == 2


def test_a_job_that_is_being_deleted_is_waited_for(cluster, here):
    cluster.train_jobs["grpo-f-0-1"] = old = body()
    old["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    end(old)  # it ended well, but its name is still taken
    soon(lambda: cluster.train_jobs.pop("grpo-f-0-1"))
    cluster.on_train_job = end
    TrainJob(here, body()).carry_out(60)
    assert cluster.counted("POST", "trainjobs") > 1


def test_a_job_deleted_under_it_ends_the_task(cluster, here):
    cluster.on_train_job = lambda job: soon(lambda: cluster.train_jobs.clear())
    with pytest.raises(StageError, match="was deleted while it ran"):
        TrainJob(here, body()).carry_out(60)


def test_a_failure_shows_every_nodes_last_lines_and_the_warnings(cluster, here):
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    status = {"name": "node", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": killed}
    cluster.pods = [node(1, "Failed", containerStatuses=[status]), node(0, "Failed")]
    cluster.logs = {"grpo-f-0-1-node-0-0": "".join(f"line {number}\n" for number in range(50))}  # node 1's is gone
    involved = {"kind": "Pod", "name": "grpo-f-0-1-node-0-1"}
    cluster.events = [
        {"metadata": {"name": "e"}, "involvedObject": involved, "reason": "BackOff", "message": "went wrong"},
        {"metadata": {"name": "f"}, "involvedObject": {"name": "other"}, "reason": "BackOff", "message": "not ours"},
    ]
    cluster.on_train_job = lambda job: end(job, "Failed", message="jobset failed")
    with pytest.raises(StageError) as caught:
        TrainJob(here, body()).carry_out(60)
    message = str(caught.value)
    assert "jobset failed" in message and "raise cluster.update.memory" in message
    assert "line 49" in message and "line 30" in message and "line 29" not in message
    assert message.index("node 0") < message.index("node 1 (") < message.index("went wrong")
    assert "not ours" not in message and cluster.train_jobs == {}


@pytest.mark.parametrize(
    ("told", "mend"),
    [
        ("0/3 nodes are available: 3 node(s) had untolerated taint {pool: gpu}.", 'tolerations = [{ key = "pool" }]'),
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "nvidia.com/gpu is short"),
        ("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector.", "gpu_type"),
    ],
)
def test_nodes_that_cannot_be_placed_say_what_is_in_the_way(cluster, here, told, mend):
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": told}
    cluster.pods = [node(0, "Pending", conditions=[condition])]
    with pytest.raises(StageError) as caught:
        TrainJob(here, body()).carry_out(0.2)
    assert told in str(caught.value) and mend in str(caught.value) and cluster.train_jobs == {}


def test_a_quota_that_refuses_the_pods_is_told(cluster, here):
    involved = {"kind": "Job", "name": "grpo-f-0-1-node-0"}
    message = "pods is forbidden: exceeded quota: grpo-gpus"
    cluster.events = [{"metadata": {"name": "e"}, "involvedObject": involved, "reason": "FailedCreate",
                       "message": message}]  # fmt: skip
    with pytest.raises(StageError, match=message):
        TrainJob(here, body()).carry_out(0.2)


def test_waiting_in_a_queue_is_no_failure(cluster, here):
    def admit(job):
        end(job, "Suspended")
        soon(lambda: end(job), 0.6)

    cluster.on_train_job = admit
    TrainJob(here, body()).carry_out(0.1)


def test_a_log_that_breaks_off_goes_on_without_a_line_twice(cluster, here, capfd):
    """Cut in the middle of the third line, then of the fifth."""
    lines = [f"step {number}" for number in range(8)]
    job_over = threading.Event()
    cluster.pods = [node(0), node(1)]
    cluster.logs["grpo-f-0-1-node-0-0"] = lambda: ("".join(f"{line}\n" for line in lines), not job_over.is_set())
    cluster.cuts["grpo-f-0-1-node-0-0"] = cuts = [90, 170, 5]

    def finish(job):
        deadline = time.monotonic() + 60
        while cuts and time.monotonic() < deadline:  # one a connection
            time.sleep(0.01)
        job_over.set()
        end(job)

    cluster.on_train_job = lambda job: soon(lambda: finish(job))
    TrainJob(here, body()).carry_out(60)
    assert capfd.readouterr().out.splitlines() == [f"[node 0] {line}" for line in lines]
    assert cuts == []


class LogAnswers:
    """Stands in for the API's log: the given answers one after another, and what was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def read_namespaced_pod_log(self, pod, namespace, **options):
        self.asked.append(options)
        return self

    def stream(self, **_):
        yield "".join(line + "\n" for line in self.answers.pop(0)).encode()

    def close(self):
        pass


@pytest.mark.parametrize("hours", [0, 2, -7])
def test_a_log_is_taken_up_again_in_any_time_zone(hours):
    """A node's clock may be set to its own zone; the kubelet stamps lines with that and asks for nothing else."""
    now = datetime.now(timezone(timedelta(hours=hours)))
    first, second = (f"{(now + timedelta(seconds=n)).isoformat(timespec='microseconds')}" for n in (-30, -20))
    core = LogAnswers([f"{first} one"], [f"{first} one", f"{second} two"])
    log = PodLog(core, "kubeflow", "node-0", "node")
    assert list(log.lines(follow=True)) == ["one"] and "since_seconds" not in core.asked[0]
    assert list(log.lines(follow=True)) == ["two"]
    assert 29 + podlog.SKEW_SECONDS <= core.asked[1]["since_seconds"] < 60 + podlog.SKEW_SECONDS


def test_no_line_is_lost_when_the_clock_changes_or_the_kubelet_speaks():
    """02:59:59+02:00 is before 02:00:00+01:00; nanoseconds count; a line without a stamp hides none after it."""
    lines = [
        "2026-10-25T02:59:59.000000001+02:00 one", "2026-10-25T02:59:59.000000002+02:00 two",
        "unable to retrieve container logs", "2026-10-25T02:00:00.000000000+01:00 three",
    ]  # fmt: skip
    core = LogAnswers(lines, lines)
    log = PodLog(core, "kubeflow", "node-0", "node")
    assert list(log.lines(follow=True)) == ["one", "two", "unable to retrieve container logs", "three"]
    assert list(log.lines(follow=True)) == ["unable to retrieve container logs"]


@pytest.mark.parametrize("cut", [15, 19, 25, 33])
def test_a_line_that_is_cut_where_the_connection_seems_to_end_comes_again_whole(cut):
    """In its time stamp, where that seems to be one of no zone, after it, and in the text."""
    first, second = (f"2026-10-25T02:00:0{number}.000000001Z {text}" for number, text in ((1, "one"), (2, "two words")))
    core = LogAnswers([first, second[:cut]], [first, second])
    core.stream = lambda **_: iter(["\n".join(core.answers.pop(0)).encode()])
    log = PodLog(core, "kubeflow", "node-0", "node")
    assert list(log.lines(follow=True)) == ["one"]
    assert list(log.lines(follow=False)) == ["two words"]


@pytest.mark.parametrize(
    ("workflow", "left"),
    [
        ({"spec": {}, "status": {"phase": "Running"}}, True),  # an eviction: the task is started again
        ({"spec": {"activeDeadlineSeconds": 0}, "status": {"phase": "Running"}}, False),  # terminated in the UI
        ({"spec": {"shutdown": "Terminate"}, "status": {"phase": "Running"}}, False),
        (None, False),  # deleted
    ],
)
def test_sigterm_takes_the_job_along_only_when_the_run_ends(cluster, here, workflow, left):
    cluster.workflows = {"grpo-f-abc": workflow} if workflow else {}
    cluster.on_train_job = lambda job: soon(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StageError, match="goes on" if left else "is deleted"):
        TrainJob(here, body()).carry_out(60)
    assert bool(cluster.train_jobs) is left


def this_pod(cluster, **metadata):
    labels = {"pipeline/runid": RUN, "workflows.argoproj.io/workflow": "grpo-f-abc"}
    pod = {"metadata": {"name": "update-1", "namespace": "kubeflow", "labels": labels} | metadata}
    cluster.pods.append(pod)


@pytest.fixture
def pod_of_the_task(cluster, monkeypatch, tmp_path):
    """A kubeconfig of the server, and the pod's name as KFP gives it."""
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "kubeflow"}}],
        "clusters": [{"name": "c", "cluster": {"server": cluster.url}}], "users": [{"name": "u", "user": {}}],
    }))  # fmt: skip
    for module in ("kubernetes.config", "kubernetes.config.kube_config"):
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.setattr(kubernetes_client.Configuration, "_default", None)
    monkeypatch.setattr(place, "NAMESPACE_FILE", tmp_path / "none")
    monkeypatch.setenv("KFP_POD_NAME", "update-1")
    return path


@pytest.mark.parametrize("owners", [[OWNER], [{"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "y"}], []])
def test_the_workflow_is_found_from_the_pods_owners_or_label(cluster, pod_of_the_task, owners):
    this_pod(cluster, ownerReferences=owners)
    found = Here.find()
    assert (found.owner, found.run_id, found.namespace) == (OWNER, RUN, "kubeflow")


def test_outside_a_run_of_kubeflow_it_says_so(cluster, pod_of_the_task):
    with pytest.raises(StageError, match="no pod update-1"):
        Here.find()
    cluster.pods.append({"metadata": {"name": "update-1", "namespace": "kubeflow", "labels": {}}})
    with pytest.raises(StageError, match="belongs to no Workflow"):
        Here.find()


def test_the_job_fits_kubeflow_trainers_definition(case, engine_model, here):
    """Every field is one that Trainer's own model knows; resources and place are those of `[cluster.update]`."""
    from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

    settings = validate(ClusterSettings, {
        "preset": "gke", "queue": "grpo", "image_pull_secrets": ["registry"],
        "update": {"gpus": 8, "gpu_type": "nvidia-h100-80gb", "cpu": "16", "memory": "200Gi", "timeout_minutes": 60,
                   "environment": {"NCCL_DEBUG": "WARN"}, "cache_claim": "grpo-cache"},
    })  # fmt: skip
    follower = following(settings, "registry.example/update@sha256:1")
    assert follower.update.gpus == 0 and follower.queue is None and follower.update.timeout_minutes == 60
    resources = NodeResources.model_validate_json(follower.update.environment[trainjob.RESOURCES_VARIABLE])
    made = describe(stage_of(case, engine_model), resources, here, "parts/x/task.json")
    assert set(TrainerV1alpha1TrainJob.from_dict(made).to_dict()["spec"]) == set(made["spec"])
    trainer = made["spec"]["trainer"]
    assert TrainerV1alpha1TrainJob.from_dict(made).to_dict()["spec"]["trainer"] == trainer
    assert trainer["numNodes"] == 3 and trainer["numProcPerNode"] == 8
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "200Gi", "nvidia.com/gpu": 8}
    assert made["metadata"]["labels"] == {
        "app.kubernetes.io/part-of": "grpo-pipeline", "grpo-pipeline/run": RUN, "kueue.x-k8s.io/queue-name": "grpo",
    }  # fmt: skip
    assert made["spec"]["activeDeadlineSeconds"] == 3600 and made["metadata"]["ownerReferences"] == [OWNER]
    patch = made["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = patch["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert TrainerV1alpha1TrainJob.from_dict(made).to_dict()["spec"]["runtimePatches"] == made["spec"]["runtimePatches"]
    domain, _, path = made["spec"]["runtimePatches"][0]["manager"].partition("/")
    assert domain and path, "Trainer's webhook refuses a manager that is not domain/path"
    if folder := os.environ.get("GRPO_CRD_DIR"):
        check_definition(made, Path(folder))


def check_definition(made, folder):
    import jsonschema

    (path,) = folder.glob("*trainjobs*")
    (version,) = yaml.safe_load(path.read_text())["spec"]["versions"]
    jsonschema.validate(made["spec"], version["schema"]["openAPIV3Schema"]["properties"]["spec"])


def merged(source, patch, key="name"):
    """Kubernetes' strategic merge, as far as a pod needs it: lists by name, mounts by path, tolerations replaced."""
    if isinstance(patch, dict) and isinstance(source, dict):
        keys = {"volumeMounts": "mountPath"}
        return source | {name: merged(source.get(name), value, keys.get(name, "name")) for name, value in patch.items()}
    if not isinstance(patch, list) or not source or not all(key in item for item in patch):
        return patch
    both = {item[key]: item for item in source}
    return list((both | {item[key]: merged(both.get(item[key], {}), item) for item in patch}).values())


@pytest.mark.parametrize("overlay", ["standalone", "gpu", "kind"])
@pytest.mark.parametrize("claim", [None, "grpo-cache"])
def test_a_node_is_a_valid_pod_with_what_the_settings_say(case, engine_model, here, overlay, claim):
    """The runtime of an overlay with the job's patch merged in as Trainer does it."""
    import kubernetes_validate

    settings = validate(ClusterSettings, {
        "update": {"gpus": 2, "shm": "4Gi", "scratch": "9Gi", "cache_claim": claim, "run_as_user": 2000,
                   "node_selector": {"pool": "a"}}, "image_pull_secrets": ["registry"], "storage_secret": "mine",
    })  # fmt: skip
    follower = following(settings, NODE["image"])
    resources = NodeResources.model_validate_json(follower.update.environment[trainjob.RESOURCES_VARIABLE])
    job = describe(stage_of(case, engine_model), resources, here, "parts/x/task.json")["spec"]
    objects = yaml.safe_load_all((ROOT / "k8s/rendered" / f"{overlay}.yaml").read_text())
    (runtime,) = [item for item in objects if item["kind"] == "TrainingRuntime"]
    (patch,) = job["runtimePatches"]
    spec = merged(runtime["spec"]["template"]["spec"], patch["trainingRuntimeSpec"]["template"]["spec"])
    (replicated,) = spec["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": pod}, "1.36", strict=True
    )
    assert all(len(set(volume) - {"name"}) == 1 for volume in pod["volumes"]), "a volume is of one kind"
    (node,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in node["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == {"/work", "/cache", "/tmp", "/dev/shm"} and len(mounts) == len(node["volumeMounts"])
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert volumes[mounts["/tmp"]]["emptyDir"] == {"sizeLimit": "9Gi"}
    found = volumes[mounts["/cache"]]
    assert found["persistentVolumeClaim"] == {"claimName": claim} if claim else found["emptyDir"] == {}
    assert pod["securityContext"]["runAsUser"] == 2000 and pod["securityContext"]["runAsNonRoot"] is True
    assert pod["nodeSelector"]["pool"] == "a" and pod["imagePullSecrets"] == [{"name": "registry"}]
    named = [entry["valueFrom"]["secretKeyRef"]["name"] for entry in job["trainer"]["env"] if "valueFrom" in entry]
    assert named == ["mine"] * 2 and "secretRef" not in json.dumps(node), "the settings' secret, and no other"


def test_without_a_secret_a_node_names_none(case, engine_model, here):
    follower = following(validate(ClusterSettings, {"storage_secret": "", "update": {}}), NODE["image"])
    resources = NodeResources.model_validate_json(follower.update.environment[trainjob.RESOURCES_VARIABLE])
    made = describe(stage_of(case, engine_model), resources, here, "parts/x/task.json")
    assert "secretKeyRef" not in json.dumps(made)


def stage_of(case, model, **changes):
    from components.common.stage import Stage

    inputs = case.start(model)
    scored = case.scored("scored", model, inputs["policy"])
    arguments = case.arguments(inputs, scored, nodes=3, **changes)
    return Stage(
        name="update", model=UpdateSettings, settings_text=arguments["settings"], iteration=0, output_offset=1,
        inputs=inputs | {"scored": scored}, outputs={name: arguments[name] for name in ("next_policy",)},
    )  # fmt: skip


def test_the_name_is_that_of_fine_tune_run_and_iteration(case, engine_model):
    stage = stage_of(case, engine_model)
    name = job_name(stage, "run-a")
    assert name == job_name(stage, "run-a") != job_name(stage, "run-b")
    assert name.startswith("grpo-case-0-") and len(name) <= 40
    stage.iteration = 1
    assert job_name(stage, "run-a").startswith("grpo-case-1-")


class Trainer:
    """What Kubeflow Trainer does: the command on every node, told apart by torchrun's variables."""

    def __init__(self, cluster, break_node=None):
        self.cluster, self.break_node, self.outputs = cluster, break_node, {}

    def __call__(self, job):
        threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def _run(self, job):
        with held_port() as port:
            self._run_nodes(job, port)

    def _run_nodes(self, job, port):
        spec = job["spec"]["trainer"]
        variables = {
            "PET_NNODES": str(spec["numNodes"]), "PET_NPROC_PER_NODE": str(spec["numProcPerNode"]),
            "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, *spec["command"][1:]]
        name = job["metadata"]["name"]
        processes = []
        for rank in range(spec["numNodes"]):
            environment = os.environ | variables | {"PET_NODE_RANK": str(rank)}
            environment.pop(trainjob.RESOURCES_VARIABLE, None)
            processes.append(subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ))  # fmt: skip
            self.cluster.pods.append(node(rank, job=name))
            self.cluster.logs[f"{name}-node-0-{rank}"] = lambda rank=rank: (self.outputs.get(rank, ""), False)
        for rank, process in enumerate(processes):
            self.outputs[rank] = process.communicate()[0]
        codes = [process.returncode for process in processes]
        end(job, "Failed" if any(codes) else "Complete", message=f"nodes ended with {codes}")


@pytest.fixture
def nodes(cluster, pod_of_the_task, monkeypatch):
    """A task in a run on a cluster where TrainJobs really run."""
    this_pod(cluster, ownerReferences=[OWNER])
    cluster.on_train_job = Trainer(cluster)
    monkeypatch.setenv(trainjob.RESOURCES_VARIABLE, json.dumps(NODE))


def test_two_nodes_of_a_trainjob_publish_what_the_task_takes_over(case, engine_model, cluster, nodes, capfd):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    found = case.update(inputs, scored, nodes=2, zero_stage=2, max_tokens_per_microbatch=24)
    assert cluster.train_jobs == {} and list(case.store.list("parts/")) == []
    assert found.policy.iteration == 1 and found.policy.parents["policy"] == Manifest.load(inputs["policy"]).digest
    assert found.policy.digest != found.policy.parents["policy"] and found.metrics["grad_norm"] > 0
    assert len(found.optimizer.names) > 1, "a file of each node's rank"
    assert "[node 0]" in capfd.readouterr().out


def test_what_the_nodes_refuse_is_the_tasks_error(case, engine_model, cluster, nodes):
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"], reward=[1.0] * 12)
    limit = {"max_zero_std_share": 0.5}
    with pytest.raises(StageError, match=r"(?s)node 0 .*zero_std.*node 1 .*zero_std"):
        case.update(inputs, scored, nodes=2, health=limit)
    assert cluster.train_jobs == {}


def test_without_a_cluster_it_says_so(case, engine_model, monkeypatch):
    monkeypatch.delenv(trainjob.RESOURCES_VARIABLE, raising=False)
    inputs = case.start(engine_model)
    scored = case.scored("scored", engine_model, inputs["policy"])
    with pytest.raises(StageError, match=r"set update\.nodes = 1"):
        case.update(inputs, scored, nodes=2)

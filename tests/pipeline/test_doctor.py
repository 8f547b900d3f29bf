"""The doctor, against a server that speaks the calls it makes, and a bucket that really is one."""

import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from cluster_server import Cluster, write_kubeconfig

from components.common import kube
from components.common.settings import validate
from components.rollout.config import RolloutSettings
from pipeline import doctor, doctor_cluster
from pipeline.connection import Connection
from pipeline.doctor import examine
from pipeline.settings import PipelineSettings

STAGES = ("configure", "dataset", "rollout", "reward", "update", "evaluate", "publish")
DIGEST = "@sha256:" + "0" * 64
NAMED = {"metadata": {"name": "x"}}


def node(name, gpus, labels, *taints):
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]},
        "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}},
    }


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    monkeypatch.setattr(kube, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH", raising=False)
    found = Cluster()
    names = [
        "namespaces/kubeflow", "customresourcedefinitions/workflows.argoproj.io",
        "customresourcedefinitions/trainjobs.trainer.kubeflow.org", "serviceaccounts/pipeline-runner",
        "serviceaccounts/grpo-janitor", "serviceaccounts/grpo-trainjob", "roles/grpo-stages",
        "secrets/grpo-object-storage", "configmaps/grpo-config", "trainingruntimes/grpo-update",
    ]  # fmt: skip
    found.objects = dict.fromkeys(names, NAMED)
    for name in names:
        if name.startswith("customresource"):
            found.objects[name] = {**NAMED, "spec": {
                "group": "g", "names": {"kind": "K", "plural": "p"}, "scope": "Namespaced",
                "versions": [{"name": "v1", "served": True, "storage": True}],
            }}  # fmt: skip
    container = {"name": "server", "image": "ghcr.io/kubeflow/kfp-api-server:2.17.0"}
    found.objects["deployments/ml-pipeline"] = {"spec": {
        "selector": {}, "template": {"spec": {"containers": [container]}}
    }}  # fmt: skip
    h100 = {"nvidia.com/gpu.product": "H100"}
    found.objects["nodes"] = {"items": [node("cpu", 0, {}), node("gpu", 8, h100, "nvidia.com/gpu")]}
    quota = {"hard": {"requests.nvidia.com/gpu": "16"}, "used": {"requests.nvidia.com/gpu": "4"}}
    found.objects["resourcequotas"] = {"items": [{"metadata": {"name": "grpo-gpus"}, "status": quota}]}
    write_kubeconfig(found, tmp_path, monkeypatch)
    yield found
    found.close()


def settings(nodes=1, **cluster):
    images = {stage: {"image": f"registry.example/{stage}{DIGEST}"} for stage in STAGES}
    for stage in ("rollout", "update"):
        images[stage] |= {"gpus": 8, "gpu_type": "H100"}
    images["rollout"]["cache_claim"] = "models"
    for stage, values in cluster.items():
        images[stage] = images.get(stage, {}) | values if isinstance(values, dict) else values
    return validate(PipelineSettings, {
        "fine_tune": "f", "model": "org/model", "store": "s3://bucket", "dataset": {"source": "gsm8k"},
        "tracking": {"enabled": False}, "update": {"nodes": nodes}, "cluster": images,
    })  # fmt: skip


@pytest.fixture
def no_bucket(monkeypatch):
    """The bucket has its own tests below."""
    monkeypatch.setattr(doctor, "storage", lambda *_: iter(()))


def findings(cluster, found):
    return {item.what: item for item in examine(found, Connection(host=cluster.url))}


def test_a_good_cluster_has_nothing_to_mend(cluster, no_bucket):
    found = findings(cluster, settings())
    assert {item.state for item in found.values()} == {"ok"}, [item.line() for item in found.values()]
    assert found["nodes for update"].detail == "1 with up to 8 nvidia.com/gpu"
    assert (
        "12 of 16" in found["quota grpo-gpus, requests.nvidia.com/gpu"].detail
        and found["Kubeflow's version"].detail == "2.17.0"
    )
    assert {"right to list pods", "right to get pods/log", "right to delete trainjobs"} <= found.keys()


@pytest.mark.parametrize(
    ("missing", "what", "mend"),
    [
        ("namespaces/kubeflow", "namespace kubeflow", "kubectl create namespace kubeflow"),
        ("secrets/grpo-object-storage", "secret grpo-object-storage", "k8s/secrets.sh kubeflow"),
        ("serviceaccounts/pipeline-runner", "service account pipeline-runner", "kubectl apply -k"),
        ("customresourcedefinitions/trainjobs.trainer.kubeflow.org", "definition trainjobs.trainer.kubeflow.org",
         "k8s/third-party/trainer"),
        ("trainingruntimes/grpo-update", "training runtime grpo-update", "kubectl apply -k"),
        ("roles/grpo-stages", "role grpo-stages", "kubectl apply -k"),
    ],
)  # fmt: skip
def test_what_is_missing_has_the_command_that_mends_it(cluster, no_bucket, missing, what, mend):
    del cluster.objects[missing]
    found = findings(cluster, settings(nodes=2, update={"gpus": 4}))
    assert found[what].state == "failure" and mend in found[what].mend
    assert [item.what for item in found.values() if item.state != "ok"] == [what]


@pytest.mark.parametrize(
    ("namespace", "queue", "overlay"),
    [("kubeflow", None, "standalone"), ("team", None, "profile"), ("team", "grpo", "gpu")],
)
def test_what_is_missing_is_applied_with_the_overlay_of_the_namespace(namespace, queue, overlay):
    cluster = settings(queue=queue).cluster
    assert doctor_cluster.apply(namespace, cluster) == f"kubectl apply -k k8s/overlays/{overlay}"
    assert (Path(__file__).parents[2] / "k8s/overlays" / overlay / "kustomization.yaml").exists()


def test_trainer_is_missed_only_by_updates_on_several_nodes(cluster, no_bucket):
    del cluster.objects["customresourcedefinitions/trainjobs.trainer.kubeflow.org"]
    assert findings(cluster, settings())["definition trainjobs.trainer.kubeflow.org"].state == "warning"


def test_denied_rights_and_what_may_not_be_looked_at(cluster, no_bucket):
    cluster.denied = {("delete", "trainjobs"), ("get", "pods/log")}
    cluster.faults["/secrets/"] = [403]
    found = findings(cluster, settings())
    assert found["right to delete trainjobs"].state == "warning"  # an update on one node has none
    assert findings(cluster, settings(nodes=2))["right to delete trainjobs"].state == "failure"
    assert found["right to get pods/log"].state == "failure"
    assert found["right to list pods"].state == "ok"
    assert found["secret grpo-object-storage"].state == "warning"


@pytest.mark.parametrize(
    ("nodes", "state", "words"),
    [
        ([node("a", 8, {})], "warning", "none has the labels nvidia.com/gpu.product=H100"),
        ([node("a", 8, {"nvidia.com/gpu.product": "H100"}, "team")], "failure", "taints it does not accept: team"),
        ([node("a", 4, {"nvidia.com/gpu.product": "H100"})], "failure", "wants 8 nvidia.com/gpu, the largest has 4"),
    ],
)
def test_pools_that_a_stage_does_not_fit_on(cluster, no_bucket, nodes, state, words):
    cluster.objects["nodes"] = {"items": nodes}
    found = findings(cluster, settings())["nodes for rollout"]
    assert found.state == state and words in found.detail and found.mend


def test_a_used_up_quota(cluster, no_bucket):
    found = findings(cluster, settings(nodes=2))["quota grpo-gpus, requests.nvidia.com/gpu"]
    assert found.state == "failure" and "12 of 16" in found.detail and "takes 16" in found.detail


@pytest.mark.parametrize(
    ("hard", "used", "state", "words"),
    [
        ({"requests.cpu": "20"}, {"requests.cpu": "500m"}, "ok", "19.5 of 20 are left, a run takes 16"),
        ({"requests.cpu": "20"}, {"requests.cpu": "5"}, "failure", "15 of 20 are left, a run takes 16"),
        ({"limits.memory": "1Ti"}, {"limits.memory": "900Gi"}, "failure", "124Gi of 1Ti are left, a run takes 128Gi"),
        ({"pods": "10"}, {"pods": "7"}, "failure", "3 of 10 are left, a run takes 4"),
    ],
)
def test_quotas_of_other_resources(cluster, no_bucket, hard, used, state, words):
    """Two nodes of 8 CPUs and 64Gi, the defaults of a GPU stage."""
    cluster.objects["resourcequotas"] = {"items": [{"metadata": {"name": "q"}, "status": {"hard": hard, "used": used}}]}
    found = findings(cluster, settings(nodes=2))[f"quota q, {next(iter(hard))}"]
    assert found.state == state and words in found.detail


def test_the_rights_of_the_runs_account_are_asked_for(cluster, no_bucket):
    what = "rights of service account pipeline-runner"
    assert what not in findings(cluster, settings())
    assert findings(cluster, settings(nodes=2))[what].state == "ok"
    cluster.denied = {("pipeline-runner", "create", "trainjobs"), ("pipeline-runner", "get", "pods/log")}
    found = findings(cluster, settings(nodes=2))[what]
    assert found.state == "failure" and found.detail == "may not create trainjobs, get pods/log"
    assert found.mend == "kubectl apply -k k8s/overlays/standalone"


@pytest.mark.parametrize(
    ("subjects", "state"), [(["pipeline-runner", "default-editor"], "ok"), (["other"], "failure"), (None, "failure")]
)
def test_where_they_may_not_be_asked_for_the_binding_is_read(cluster, no_bucket, subjects, state):
    cluster.faults["/localsubjectaccessreviews"] = [403]
    if subjects:
        cluster.objects["rolebindings/grpo-stages"] = {
            "roleRef": {"apiGroup": "x", "kind": "Role", "name": "grpo-stages"},
            "subjects": [{"kind": "ServiceAccount", "name": name} for name in subjects],
        }
    assert findings(cluster, settings(nodes=2))["rights of service account pipeline-runner"].state == state


def test_the_rights_the_doctor_asks_for_are_those_the_role_grants():
    documents = yaml.safe_load_all((Path(__file__).parents[2] / "k8s/base/runs/rbac.yaml").read_text())
    (role,) = [found for found in documents if found["kind"] == "Role" and found["metadata"]["name"] == "grpo-stages"]
    granted = {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    asked = {(v, g, r + (f"/{part}" if part else "")) for v, g, r, part in doctor_cluster.ACCOUNT_RIGHTS}
    assert asked == granted


def test_another_version_of_kubeflow(cluster, no_bucket):
    spec = cluster.objects["deployments/ml-pipeline"]["spec"]["template"]["spec"]
    spec["containers"][0]["image"] = "ghcr.io/kubeflow/kfp-api-server:2.9.0"
    assert findings(cluster, settings())["Kubeflow's version"].state == "warning"


@pytest.mark.parametrize(
    ("image", "state"),
    [
        ("ghcr.io/org/name" + DIGEST, "ok"), ("localhost:5000/a/b:1.2" + DIGEST, "ok"),
        ("ghcr.io/org/name:1.2", "warning"), ("name:latest", "failure"), ("name", "failure"),
        ("Ghcr.io/Org/Name:1", "failure"), ("name@sha256:12", "failure"), ("a b", "failure"),
    ],
)  # fmt: skip
def test_images(image, state):
    found = {item.what: item for item in doctor.images(settings(reward={"image": image}).cluster)}
    assert found["image of reward"].state == state


def test_a_cache_of_compiled_graphs_that_ends_with_its_pod():
    without = {"cache_claim": None}
    (found,) = doctor.compile_cache(settings(rollout=without))
    assert (found.state, "cluster.rollout.cache_claim" in found.mend) == ("warning", True)
    for quiet in ({"cache_claim": "models"}, {"gpus": 0, "gpu_type": None} | without):
        assert not list(doctor.compile_cache(settings(rollout=quiet)))
    eager = validate(RolloutSettings, {"vllm": {"enforce_eager": True}})
    assert not list(doctor.compile_cache(settings(rollout=without).model_copy(update={"rollout": eager})))


def test_without_a_cluster_the_rest_is_checked(monkeypatch, no_bucket, tmp_path):
    for module in ("kubernetes.config", "kubernetes.config.kube_config"):
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kube, "FIRST_PAUSE_SECONDS", 0.01)
    found = {item.what: item for item in examine(settings(), Connection())}
    assert found["image of update"].state == "ok"
    assert found["Kubeflow Pipelines"].state == "failure" and "port-forward" in found["Kubeflow Pipelines"].mend
    assert found["Kubernetes"].state == "failure" and "not checked" in found["Kubernetes"].detail


def test_an_expired_token(cluster, no_bucket):
    cluster.token = "good"
    found = findings(cluster, settings())
    assert "expired" in found["Kubeflow Pipelines"].detail and "401" in found["Kubernetes"].detail


def test_a_bucket_is_tried_out(monkeypatch):
    """A real S3 protocol server; what it lacks is said, not hidden."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
        found = {item.what: item for item in doctor.storage(f"s3://bucket/p?endpoint={endpoint}&region=us-east-1")}
        assert found["storage, write, read, delete"].state == "ok"
        inside = "s3://bucket/p?endpoint=http://nowhere.kubeflow:9000&region=us-east-1"
        assert next(iter(doctor.storage(inside, endpoint))).state == "ok"
        (missing,) = doctor.storage(f"s3://none/p?endpoint={endpoint}&region=us-east-1")
        assert missing.state == "failure" and missing.mend
    finally:
        server.stop()
    (local,) = doctor.storage("file:///tmp/x")
    assert local.state == "failure" and "s3://" in local.mend


def test_a_bucket_inside_the_cluster_is_a_warning_with_the_way_to_it(monkeypatch):
    (found,) = doctor.storage("s3://mlpipeline/grpo?endpoint=http://nowhere.kubeflow.svc.cluster.local:8333")
    assert found.state == "warning" and "svc/nowhere 9000:8333" in found.detail
    (found,) = doctor.storage("s3://bucket/p?endpoint=http://store.example", "http://127.0.0.1:9")
    assert found.state == "warning" and "http://127.0.0.1:9 is not to be reached" in found.detail


def test_mlflow_is_asked(cluster):
    cluster.objects["health"] = "OK"
    here = settings().model_copy(update={"tracking": settings().tracking.model_copy(update={
        "enabled": True, "uri": f"{cluster.url}/api/v1"})})  # fmt: skip
    (found,) = doctor.tracking(here)
    assert found.state == "ok"
    cluster.objects.clear()
    (found,) = doctor.tracking(here)
    assert found.state == "warning" and "404" in found.detail


def test_the_command_fails_when_something_does(cluster, no_bucket, tmp_path):
    from typer.testing import CliRunner

    from pipeline.cli import app

    runner = CliRunner()
    result = runner.invoke(app, ["doctor", "--host", cluster.url])
    assert result.exit_code == 0 and "no file given" in result.output, result.output
    cluster.denied = {(verb, resource) for verb, _, resource, _ in doctor_cluster.RIGHTS}
    assert runner.invoke(app, ["doctor", "--host", cluster.url]).exit_code == 1

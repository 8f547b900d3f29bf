"""What holds for every object this repository applies, whatever the overlay."""

import re
from pathlib import Path

import pytest
import yaml

RELEASE = re.compile(r"[^:@]+(:\d+)?(/[^:@]+)*(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$")
"""An image by release or digest; the first part may be a registry with a port."""

QUANTITY = re.compile(r"^\d+(m|Ki|Mi|Gi|Ti)?$")


def test_pods_meet_pod_security_restricted(pods: dict[str, dict], containers: dict[str, dict]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, every rule of `restricted`."""
    for name, pod in pods.items():
        spec, context = pod["spec"], pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0, name
        assert context["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost"), name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        allowed = {
            "configMap",
            "csi",
            "downwardAPI",
            "emptyDir",
            "ephemeral",
            "persistentVolumeClaim",
            "projected",
            "secret",
        }
        assert all(set(volume) - {"name"} <= allowed for volume in spec.get("volumes", [])), name
        assert not any("hostPort" in port for item in spec["containers"] for port in item.get("ports", [])), name
    for name, container in containers.items():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert not context.get("privileged") and context.get("runAsNonRoot") is not False, name
        assert "procMount" not in context, name


def test_roots_are_read_only_and_every_writable_path_is_a_volume(
    pods: dict[str, dict], containers: dict[str, dict]
) -> None:
    for name, container in containers.items():
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounts, name
        if "grpo-pipeline-" in container["image"]:
            assert {"/work", "/cache"} <= mounts, f"{name}: our images write to /work and /cache"
    for name, pod in pods.items():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])} | {"data"}
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name


def test_every_container_requests_resources(containers: dict[str, dict]) -> None:
    for name, container in containers.items():
        requests = container["resources"]["requests"]
        assert QUANTITY.match(str(requests["cpu"])) and QUANTITY.match(str(requests["memory"])), name


def test_images_are_pinned_by_release(containers: dict[str, dict]) -> None:
    for name, container in containers.items():
        assert RELEASE.fullmatch(container["image"]), f"{name} runs {container['image']}"
        assert container["imagePullPolicy"] == "IfNotPresent", name


@pytest.mark.parametrize(
    ("image", "pinned"),
    [
        ("registry.example.com/a/b:0.1.0", True),
        ("localhost:5000/a:1", True),
        ("a@sha256:" + "0" * 64, True),
        ("registry.example.com/a/b:latest", False),
        ("registry.example.com/a/b", False),
        ("localhost:5000/a", False),
    ],
)
def test_what_counts_as_pinned(image: str, pinned: bool) -> None:
    assert bool(RELEASE.fullmatch(image)) is pinned


def test_servers_have_all_three_probes(objects: list[dict]) -> None:
    servers = [item for item in objects if item["kind"] in ("Deployment", "StatefulSet")]
    assert {item["metadata"]["name"] for item in servers} == {"mlflow", "postgres"}
    for item in servers:
        for container in item["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), item["metadata"]["name"]


def test_services_reach_a_pod(objects: list[dict], pods: dict[str, dict]) -> None:
    for service in (item for item in objects if item["kind"] == "Service"):
        namespace, selector = service["metadata"]["namespace"], service["spec"]["selector"]
        behind = [
            pod
            for pod in pods.values()
            if pod["namespace"] == namespace and selector.items() <= pod["metadata"]["labels"].items()
        ]
        assert len(behind) == 1
        ports = {port["name"] for item in behind[0]["spec"]["containers"] for port in item.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def secret_keys(k8s: Path) -> dict[str, set[str]]:
    """Keys of each Secret the template names."""
    template = yaml.safe_load_all((k8s / "secrets.template.yaml").read_text())
    return {item["metadata"]["name"]: set(item["stringData"]) for item in template}


def test_everything_a_pod_names_exists(k8s: Path, objects: list[dict], pods: dict[str, dict]) -> None:
    def names(kind: str, namespace: str) -> set[str]:
        return {
            item["metadata"]["name"]
            for item in objects
            if item["kind"] == kind and item["metadata"].get("namespace", namespace) == namespace
        }

    secrets = secret_keys(k8s)
    for owner, pod in pods.items():
        spec, namespace = pod["spec"], pod["namespace"]
        assert spec["serviceAccountName"] in names("ServiceAccount", namespace), owner
        assert spec["priorityClassName"] in names("PriorityClass", ""), owner
        for volume in spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names("PersistentVolumeClaim", namespace), owner
        for container in spec.get("initContainers", []) + spec["containers"]:
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert source["configMapRef"]["name"] in names("ConfigMap", namespace), owner
                else:
                    assert source["secretRef"]["name"] in secrets, owner
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    assert reference["key"] in secrets[reference["name"]], owner


def test_what_compiled_pipelines_name_by_default_exists(k8s: Path, objects: list[dict], overlay: str) -> None:
    """Secret, ConfigMap and their keys of `[cluster]` as it is; the queue and the claim that the documents tell of."""
    from pipeline.resources import ClusterSettings

    cluster, stages = ClusterSettings(), "grpo" if overlay in ("profile", "gpu") else "kubeflow"
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= secret_keys(k8s)[cluster.storage_secret]
    (config,) = [item for item in objects if item["metadata"]["name"] == cluster.config_map]
    assert config["metadata"]["namespace"] == stages
    assert {"AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI"} <= set(config["data"])
    assert cluster.queue is None and cluster.hub_secret is None and cluster.service_account is None
    documented = (k8s.parent / "docs/cluster.md").read_text()
    (claim,) = yaml.safe_load_all((k8s / "components/shared-cache/claim.yaml").read_text())
    (queue,) = [item for item in yaml.safe_load_all((k8s / "components/kueue/queues.yaml").read_text())
                if item["kind"] == "LocalQueue"]  # fmt: skip
    assert f'cache_claim = "{claim["metadata"]["name"]}"' in documented
    assert f'queue = "{queue["metadata"]["name"]}"' in documented


def test_secrets_are_never_in_the_repository(k8s: Path, objects: list[dict]) -> None:
    assert not [item for item in objects if item["kind"] == "Secret"]
    template = list(yaml.safe_load_all((k8s / "secrets.template.yaml").read_text()))
    assert template and all(value == "" for item in template for value in item["stringData"].values())
    script = (k8s / "secrets.sh").read_text()
    for name, keys in secret_keys(k8s).items():
        assert name in script and all(key in script for key in keys), f"secrets.sh does not create {name}"


def test_every_object_says_its_namespace(objects: list[dict]) -> None:
    cluster_scoped = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"}
    for item in objects:
        assert ("namespace" in item["metadata"]) != (item["kind"] in cluster_scoped), item["metadata"]["name"]


def test_accounts_hold_a_token_only_where_it_is_used(objects: list[dict], pods: dict[str, dict]) -> None:
    accounts = [item for item in objects if item["kind"] == "ServiceAccount"]
    assert all(item["automountServiceAccountToken"] is False for item in accounts)
    with_token = {owner for owner, pod in pods.items() if pod["spec"]["automountServiceAccountToken"]}
    assert with_token == {"CronJob/grpo-janitor"}


def test_stages_and_their_rights_are_in_one_namespace(objects: list[dict], overlay: str) -> None:
    expected = "grpo" if overlay in ("profile", "gpu") else "kubeflow"
    bindings = [item for item in objects if item["kind"] == "RoleBinding"]
    assert bindings
    for item in bindings:
        assert item["metadata"]["namespace"] == expected
        assert {subject["namespace"] for subject in item["subjects"]} == {expected}


def test_our_namespaces_enforce_restricted(objects: list[dict], overlay: str) -> None:
    namespaces = {
        item["metadata"]["name"]: item["metadata"]["labels"] for item in objects if item["kind"] == "Namespace"
    }
    assert namespaces.keys() == ({"grpo-tracking", "grpo"} if overlay in ("profile", "gpu") else {"grpo-tracking"})
    assert all(labels["pod-security.kubernetes.io/enforce"] == "restricted" for labels in namespaces.values())


def test_gpu_pools_are_selected_and_tolerated(pods: dict[str, dict], overlay: str) -> None:
    """kind and gpu send a TrainJob's nodes to the update pool; the others leave placement to the cluster."""
    spec = pods["TrainingRuntime/grpo-update"]["spec"]
    if overlay in ("gpu", "kind"):
        assert spec["nodeSelector"] == {"grpo-pipeline/pool": "update"}
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
        assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1}
    else:
        assert "nodeSelector" not in spec


def test_queues_name_flavors_and_queues_that_exist(objects: list[dict], overlay: str) -> None:
    by_kind = {
        kind: {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}
        for kind in ("ResourceFlavor", "ClusterQueue", "LocalQueue", "TrainingRuntime")
    }
    if overlay != "gpu":
        assert not by_kind["ClusterQueue"]
        return
    for queue in by_kind["LocalQueue"].values():
        assert queue["spec"]["clusterQueue"] in by_kind["ClusterQueue"]
    for queue in by_kind["ClusterQueue"].values():
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                assert flavor["name"] in by_kind["ResourceFlavor"]
                assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]

"""The TrainJob of one update on several machines, described; `trainjob.py` makes and follows it."""

import hashlib
import re
from typing import Any

from pydantic import Field

from components.common.kube import PART_OF, TRAIN_JOB_RUN_LABEL
from components.common.settings import Settings
from components.common.stage import Stage
from components.update.cluster import Here
from components.update.config import UpdateSettings

RUNTIME = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "grpo-update"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
MANAGER = "grpo-pipeline/update"
"""Who patches the runtime; Trainer's webhook wants a domain and a path."""
CLAIMED_CACHE = "claimed-cache"
COMMAND = ("python3", "-m", "components.update.remote")


class NodeResources(Settings):
    """What each node of the job gets."""

    image: str
    """Container image."""
    cpu: str
    """CPUs requested."""
    memory: str
    """Memory requested, and its limit."""
    gpus: int = 0
    """GPUs of a node."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    shm: str | None = None
    """Size of `/dev/shm`."""
    scratch: str | None = None
    """Size of `/tmp`."""
    cache_claim: str | None = None
    """PersistentVolumeClaim of `/cache`; unset: the runtime's own volume."""
    run_as_user: int | None = None
    """User id of the process; unset: the runtime's own."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes."""
    tolerations: list[dict[str, str]] = []
    """Taints the nodes may have."""
    environment: dict[str, str] = {}
    """Environment variables."""
    storage_secret: str | None = None
    """Secret with the bucket's keys."""
    image_pull_secrets: list[str] = []
    """Secrets with registry credentials."""
    queue: str | None = None
    """Kueue LocalQueue."""
    timeout_seconds: int = Field(default=43_200, ge=1)
    """Kubernetes ends the job after that."""
    pending_seconds: int = Field(default=1800, ge=1)
    """The job fails when nodes cannot be scheduled, or their image not pulled, for that long."""


def job_name(stage: Stage[UpdateSettings], run_id: str) -> str:
    """Fine-tune and iteration for people, a digest of fine-tune, run and work for uniqueness; at most 40 characters."""
    readable = re.sub(r"[^a-z0-9-]", "-", stage.context.fine_tune)[:18].strip("-")
    text = f"{stage.context.fine_tune}/{run_id}/{stage.producer.key}"
    return f"grpo-{readable}-{stage.iteration or 0}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def describe(stage: Stage[UpdateSettings], node: NodeResources, here: Here, task: str) -> dict[str, Any]:
    """The TrainJob: what is not named comes from the TrainingRuntime `grpo-update`."""
    resources: dict[str, Any] = {
        "requests": {"cpu": node.cpu, "memory": node.memory}, "limits": {"memory": node.memory}
    }  # fmt: skip
    if node.gpus:
        for kind in ("requests", "limits"):
            resources[kind][node.gpu_resource] = node.gpus
    queue = {QUEUE_LABEL: node.queue} if node.queue else {}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "name": job_name(stage, here.run_id),
            "labels": PART_OF | {TRAIN_JOB_RUN_LABEL: here.run_id} | queue,
            "ownerReferences": [here.owner],
        },
        "spec": {
            "runtimeRef": RUNTIME,
            "activeDeadlineSeconds": node.timeout_seconds,
            "trainer": {
                "image": node.image,
                "command": [*COMMAND, "--store", stage.context.store, "--task", task],
                "numNodes": stage.settings.nodes,
                "numProcPerNode": _processes(stage.settings, node),
                "resourcesPerNode": resources,
                "env": _environment(node),
            },
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": _patch(node)}],
        },
    }


def _processes(settings: UpdateSettings, node: NodeResources) -> int:
    return settings.num_processes if settings.num_processes != "auto" else max(node.gpus, 1)


def _environment(node: NodeResources) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in node.environment.items()]
    if node.storage_secret:
        entries += [
            {"name": key, "valueFrom": {"secretKeyRef": {"name": node.storage_secret, "key": key}}}
            for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        ]
    return entries


def _patch(node: NodeResources) -> dict[str, Any]:
    """Where the nodes run, as whom, and their volumes; Trainer merges it into the runtime's pod, lists by name.

    The claim is a volume of its own, mounted in place of the runtime's: merged into that, it would make a volume of two
    kinds, which Kubernetes refuses.
    """
    volumes = [
        {"name": name, "emptyDir": {"sizeLimit": size} | ({"medium": "Memory"} if name == "shm" else {})}
        for name, size in (("shm", node.shm), ("tmp", node.scratch))
        if size
    ]
    containers: list[dict[str, Any]] = []
    if node.cache_claim:
        volumes.append({"name": CLAIMED_CACHE, "persistentVolumeClaim": {"claimName": node.cache_claim}})
        containers.append({"name": "node", "volumeMounts": [{"name": CLAIMED_CACHE, "mountPath": "/cache"}]})
    spec: dict[str, Any] = {
        "securityContext": {"runAsUser": node.run_as_user} if node.run_as_user else {},
        "nodeSelector": node.node_selector,
        "tolerations": node.tolerations,
        "volumes": volumes,
        "containers": containers,
        "imagePullSecrets": [{"name": name} for name in node.image_pull_secrets],
    }
    pod = {"spec": {name: value for name, value in spec.items() if value}}
    return {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": pod}}}]}}}

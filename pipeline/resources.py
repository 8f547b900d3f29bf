"""Where a stage's pod runs and what it gets: declared under `[cluster]`, applied to the tasks of the graph.

`[cluster]` holds what all stages share, `[cluster.<stage>]` what one needs. A preset fills in what a cloud calls its
GPU pools; what the file says wins over it.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from components.common.settings import Settings, validate
from components.configure.pods import QUANTITY, Pod, Toleration, by_stage
from components.configure.pods import STAGES as FORM_STAGES

CACHE_MOUNT = "/cache"
SHM_MOUNT = "/dev/shm"
SCRATCH_MOUNT = "/tmp"
KUEUE_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

PRESETS: dict[str, dict[str, Any]] = {
    "gpu-operator": {"label": "nvidia.com/gpu.product", "taint": "nvidia.com/gpu", "spot_label": {}, "spot_taint": ""},
    "gke": {
        "label": "cloud.google.com/gke-accelerator",
        "taint": "nvidia.com/gpu",
        "spot_label": {"cloud.google.com/gke-spot": "true"},
        "spot_taint": "cloud.google.com/gke-spot",
    },
    "eks": {
        "label": "karpenter.k8s.aws/instance-gpu-name",
        "taint": "nvidia.com/gpu",
        "spot_label": {"karpenter.sh/capacity-type": "spot"},
        "spot_taint": "",
    },
    "aks": {
        "label": "kubernetes.azure.com/agentpool",
        "taint": "sku",
        "spot_label": {"kubernetes.azure.com/scalesetpriority": "spot"},
        "spot_taint": "kubernetes.azure.com/scalesetpriority",
    },
}
"""What a cloud labels and taints its GPU nodes with. Sources: GPU operator's feature discovery labels; GKE GPU node
pools; Karpenter's AWS labels; AKS node pools (GPU pools carry the taint `sku=gpu` by its documentation)."""


class StageResources(Pod):
    """One stage's pod."""

    cpu_limit: str | None = Field(default=None, pattern=QUANTITY)
    """CPUs at most; unset: no limit."""
    gpu_type: str | None = None
    """Value of the node label that names the GPU type or pool in the preset's cloud, e.g. `nvidia-h100-80gb`."""
    gpu_memory: str | None = Field(default=None, pattern=QUANTITY)
    """Memory of one GPU, for `grpo plan`; unset: what a known `gpu_type` has."""
    spot: bool = False
    """Run on nodes that may be taken away: fit for rollouts, which resume at the first unfinished group."""
    shm: str | None = Field(default=None, pattern=QUANTITY)
    """Size of `/dev/shm`, for communication between the GPUs of a pod; counts as memory."""
    scratch: str = Field(default="20Gi", pattern=QUANTITY)
    """Size of `/tmp`, where artifacts are unpacked."""
    cache_claim: str | None = None
    """PersistentVolumeClaim mounted as the node cache at `/cache`, which `run_as_user` must be able to write; unset: an
    empty volume of the pod."""
    cache_size: str = Field(default="50Gi", pattern=QUANTITY)
    """Bound of the cache."""
    timeout_minutes: int = Field(default=720, ge=1)
    """The task fails after that."""
    pending_minutes: int = Field(default=30, ge=1)
    """An update on several nodes fails when they cannot start for that long; waiting in a queue does not count."""
    retries: int = Field(default=2, ge=0, le=10)
    """Times a failed task is started again; a stage goes on where it was."""
    retry_backoff_seconds: int = Field(default=30, ge=0)
    """Pause before the first retry; doubled each time, an hour at most."""
    run_as_user: int | None = Field(default=1000, ge=1)
    """User id of the process; our images have 1000."""
    environment: dict[str, str] = {}
    """Environment variables."""


STAGES = ("configure", "dataset", "rollout", "reward", "update", "evaluate", "publish")
CPU_STAGE = StageResources()
GPU_STAGE = StageResources(cpu="8", memory="64Gi", gpus=1, shm="16Gi", scratch="100Gi")


class ClusterSettings(Settings):
    """Where the stages run. Ignored by local runs."""

    preset: Literal["gpu-operator", "gke", "eks", "aks"] = "gpu-operator"
    """How the cluster labels and taints GPU nodes."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When images are pulled; nodes of an update on several are pulled as the TrainingRuntime says (`IfNotPresent`)."""
    image_pull_secrets: tuple[str, ...] = ()
    """Secrets with registry credentials."""
    storage_secret: str | None = "grpo-object-storage"
    """Secret with `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`; blank: the identity of the pod's service account
    (IRSA, workload identity), which nodes of an update on several have as `grpo-trainjob`."""
    hub_secret: str | None = None
    """Secret with `HF_TOKEN`, for gated models and data sets."""
    config_map: str | None = "grpo-config"
    """ConfigMap whose `AWS_DEFAULT_REGION` and `MLFLOW_TRACKING_URI` become environment variables."""
    queue: str | None = None
    """Kueue LocalQueue the pods wait in."""
    service_account: str | None = None
    """Service account of the run; unset: Kubeflow's (`pipeline-runner` or `default-editor`)."""
    max_tasks: int = Field(default=40, ge=11)
    """Tasks of one run; a longer fine-tune is a chain of runs. A run is one object in etcd, which takes 1.5 MiB: about
    35 KB a task, so 40 fit, 8 iterations of one shard."""
    prices: dict[str, float] = {}
    """Price of an hour of one GPU, by `gpu_type`, in any currency, for `grpo plan`: `{ nvidia-h100-80gb = 3.9 }`."""
    configure: StageResources = CPU_STAGE
    """Pod of configure."""
    dataset: StageResources = CPU_STAGE
    """Pod of dataset."""
    rollout: StageResources = GPU_STAGE
    """Pods of rollout."""
    reward: StageResources = CPU_STAGE
    """Pod of reward."""
    update: StageResources = GPU_STAGE
    """Pod of update."""
    evaluate: StageResources = CPU_STAGE
    """Pod of evaluate."""
    publish: StageResources = CPU_STAGE
    """Pod of publish."""

    @model_validator(mode="before")
    @classmethod
    def _keep_stage_defaults(cls, values: Any) -> Any:
        """A section that names one value keeps the stage's defaults for the rest."""
        if isinstance(values, dict):
            for stage in ("rollout", "update"):
                if isinstance(values.get(stage), dict):
                    values = values | {stage: GPU_STAGE.model_dump(exclude_defaults=True) | values[stage]}
        return values

    def stage(self, name: str) -> StageResources:
        """The pod of a stage."""
        return getattr(self, name)


def node_selector(cluster: ClusterSettings, pod: StageResources) -> dict[str, str]:
    """Labels the pod's node must have."""
    preset = PRESETS[cluster.preset]
    labels = {preset["label"]: pod.gpu_type} if pod.gpus and pod.gpu_type else {}
    return labels | (preset["spot_label"] if pod.spot else {}) | pod.node_selector


def tolerations(cluster: ClusterSettings, pod: StageResources) -> list[Toleration]:
    """Taints the pod accepts: GPU pools', spot pools', and what the settings add."""
    preset = PRESETS[cluster.preset]
    keys = [preset["taint"]] if pod.gpus else []
    keys += [preset["spot_taint"]] if pod.spot and preset["spot_taint"] else []
    known = [Toleration(key=key) for key in keys]
    return [found for found in known if found not in pod.tolerations] + list(pod.tolerations)


def pod_values(cluster: ClusterSettings, pod: StageResources, image: str) -> dict[str, Any]:
    """What the form asks of a pod, as the settings have it: text, and JSON for what is no text."""
    return {
        "image": image, "cpu": pod.cpu, "memory": pod.memory, "gpus": str(pod.gpus), "gpu_resource": pod.gpu_resource,
        "node_selector": node_selector(cluster, pod),
        "tolerations": [found.model_dump(exclude_none=True) for found in tolerations(cluster, pod)],
    }  # fmt: skip


def form_of(cluster: ClusterSettings, stage: str, *, nodes: int = 1) -> dict[str, Any]:
    """Those of them that are parameters of a run. None of an update on several nodes: its TrainJob is written into an
    environment variable, which takes constants; no GPUs of a stage that has none: KFP's limit cannot be left out then.
    """
    if stage not in FORM_STAGES or (stage == "update" and nodes > 1):
        return {}
    pod = cluster.stage(stage)
    values = pod_values(cluster, pod, str(pod.image))
    return values if pod.gpus else {name: values[name] for name in values if not name.startswith("gpu")}


def with_form(cluster: ClusterSettings, given: Mapping[str, Any]) -> ClusterSettings:
    """The same settings with what a run was given for its pods (parameter name → value): for the run after it."""
    for stage, values in by_stage(given).items():
        pod = cluster.stage(stage)
        before = pod_values(cluster, pod, str(pod.image))
        changed = {name: value for name, value in values.items() if value != before[name]}
        if {"node_selector", "tolerations"} & changed.keys():  # they hold what type and spot come to
            changed |= {name: values.get(name, before[name]) for name in ("node_selector", "tolerations")}
            changed |= {"gpu_type": None, "spot": False}
        found = validate(StageResources, pod.model_dump() | changed, where=f"cluster.{stage}")
        cluster = cluster.model_copy(update={stage: found})
    return cluster


FOLLOWER = StageResources(cpu="500m", memory="1Gi", scratch="1Gi", cache_size="1Gi")
"""Pod of an update on several nodes: it follows the TrainJob, and needs neither a GPU nor torch."""
NODES_VARIABLE = "GRPO_UPDATE_NODES"


def following(cluster: ClusterSettings, image: str) -> ClusterSettings:
    """The same settings with a small pod for `update`, which tells it what each node of its TrainJob gets."""
    pod = cluster.update
    node = {
        "image": image, "cpu": pod.cpu, "memory": pod.memory, "gpus": pod.gpus, "gpu_resource": pod.gpu_resource,
        "shm": pod.shm, "scratch": pod.scratch, "node_selector": node_selector(cluster, pod),
        "cache_claim": pod.cache_claim, "run_as_user": pod.run_as_user,
        "tolerations": [found.model_dump(exclude_none=True) for found in tolerations(cluster, pod)],
        "environment": pod.environment, "storage_secret": cluster.storage_secret, "queue": cluster.queue,
        "image_pull_secrets": list(cluster.image_pull_secrets), "timeout_seconds": pod.timeout_minutes * 60,
        "pending_seconds": pod.pending_minutes * 60,
    }  # fmt: skip
    same = pod.model_dump(include={"timeout_minutes", "retries", "retry_backoff_seconds", "run_as_user"})
    changes = same | {"environment": {NODES_VARIABLE: json.dumps(node, sort_keys=True)}}
    # Kueue counts the nodes, not the pod that follows them: both in one queue could wait for each other.
    return cluster.model_copy(update={"update": FOLLOWER.model_copy(update=changes), "queue": None})


def apply(task: Any, stage: str, cluster: ClusterSettings, image: str, form: Mapping[str, Any] | None = None) -> None:
    """Gives a task of the graph its image, resources, place, volumes, secrets and limits.

    `form`: parameters of the run, by setting, that stand for values of `pod_values`.
    """
    from kfp import kubernetes

    pod, form = cluster.stage(stage), form or {}
    task.register_pipeline_channels(list(form.values()))  # kfp forgets those of resources inside a loop or condition
    given = pod_values(cluster, pod, image) | form
    task.set_container_image(given["image"])
    task.set_cpu_request(given["cpu"]).set_memory_request(given["memory"]).set_memory_limit(given["memory"])
    if pod.cpu_limit:
        task.set_cpu_limit(pod.cpu_limit)
    if pod.gpus:
        task.set_accelerator_type(given["gpu_resource"]).set_accelerator_limit(given["gpus"])
    if "node_selector" in form:
        kubernetes.add_node_selector_json(task, form["node_selector"])
    else:
        for key, value in given["node_selector"].items():
            kubernetes.add_node_selector(task, key, value)
    kubernetes.add_toleration_json(task, given["tolerations"])
    _mount(task, pod)
    _identify(task, cluster, pod)
    kubernetes.set_timeout(task, pod.timeout_minutes * 60)
    if pod.retries:
        backoff = f"{pod.retry_backoff_seconds}s"
        task.set_retry(pod.retries, backoff_duration=backoff, backoff_factor=2.0, backoff_max_duration="3600s")
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "grpo-pipeline")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", stage)
    if cluster.queue:
        kubernetes.add_pod_label(task, KUEUE_QUEUE_LABEL, cluster.queue)


def _mount(task: Any, pod: StageResources) -> None:
    from kfp import kubernetes

    kubernetes.empty_dir_mount(task, "scratch", SCRATCH_MOUNT, size_limit=pod.scratch)
    if pod.shm:
        kubernetes.empty_dir_mount(task, "shm", SHM_MOUNT, medium="Memory", size_limit=pod.shm)
    if pod.cache_claim:
        kubernetes.mount_pvc(task, pod.cache_claim, CACHE_MOUNT)
    else:
        kubernetes.empty_dir_mount(task, "cache", CACHE_MOUNT, size_limit=pod.cache_size)
    for name, value in pod.environment.items():
        task.set_env_variable(name, value)


def _identify(task: Any, cluster: ClusterSettings, pod: StageResources) -> None:
    from kfp import kubernetes

    kubernetes.set_image_pull_policy(task, cluster.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    if pod.run_as_user:
        kubernetes.set_security_context(task, run_as_user=pod.run_as_user, run_as_non_root=True)
    if cluster.storage_secret:
        keys = {name: name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        kubernetes.use_secret_as_env(task, cluster.storage_secret, keys)
    if cluster.hub_secret:
        kubernetes.use_secret_as_env(task, cluster.hub_secret, {"HF_TOKEN": "HF_TOKEN"})
    if cluster.config_map:
        keys = {name: name for name in ("AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI")}
        kubernetes.use_config_map_as_env(task, cluster.config_map, keys, optional=True)


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: `64Gi` in bytes, `500m` in units, and as a server may write it, `12e6`."""
    units = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
    for unit, factor in (binary | units).items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)

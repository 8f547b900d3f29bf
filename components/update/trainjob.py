"""One update on several machines: a Kubeflow TrainJob, made, followed and deleted by the task of the pipeline.

The task's own pod needs no GPU. The job's name derives from the work, so a task that is started again finds the job it
had made; the Workflow owns the job, so it goes with the run.
"""

import hashlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from components.common.errors import StageError
from components.common.kube import PART_OF, TRAIN_JOB_RUN_LABEL, TRAIN_JOBS, ClusterError, call, status_of
from components.common.settings import Settings
from components.common.stage import Stage
from components.update import remote
from components.update.cluster import Here
from components.update.config import UpdateSettings
from components.update.watching import LogFollower, last_words, node_troubles

RESOURCES_VARIABLE = "GRPO_UPDATE_NODES"
"""The task's environment variable with the nodes' resources, as JSON; the compiled pipeline sets it."""
RUNTIME = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "grpo-update"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
COMMAND = ("python3", "-m", "components.update.remote")
POLL_SECONDS = 5.0
GONE_SECONDS = 300.0
"""How long a deleted job may take to be gone: its nodes have two minutes to end."""

log = logging.getLogger("grpo")


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
    cache: dict[str, Any] | None = None
    """Volume source of `/cache`; unset: the runtime's own."""
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


def run(stage: Stage[UpdateSettings]) -> None:
    """Carries the update out as a TrainJob and takes over what it publishes.

    Raises:
        StageError: the job failed, with the last lines of every node; or this process is in no cluster.
        ClusterError: Kubernetes refused.
    """
    text = os.environ.get(RESOURCES_VARIABLE)
    if text is None:
        raise StageError(
            f"update.nodes = {stage.settings.nodes} needs a task of the compiled pipeline on a cluster "
            f"({RESOURCES_VARIABLE} is not set); here, set update.nodes = 1"
        )
    here = Here.find()
    job = TrainJob(here, describe(stage, NodeResources.model_validate_json(text), here, remote.leave(stage)))
    job.carry_out(NodeResources.model_validate_json(text).pending_seconds)
    stage.store.delete(remote.task_key(stage))
    if not stage.adopt():
        raise StageError(f"TrainJob {job.name} ended well and published nothing; look at the log of its first node")


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
            "runtimePatches": [{"manager": "grpo-pipeline", "trainingRuntimeSpec": _patch(node)}],
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
    """Where the nodes run, and their volumes."""
    volumes = [
        {"name": name, "emptyDir": {"sizeLimit": size} | ({"medium": "Memory"} if name == "shm" else {})}
        for name, size in (("shm", node.shm), ("tmp", node.scratch))
        if size
    ]
    volumes += [{"name": "cache", **node.cache}] if node.cache else []
    spec = {
        "nodeSelector": node.node_selector,
        "tolerations": node.tolerations,
        "volumes": volumes,
        "imagePullSecrets": [{"name": name} for name in node.image_pull_secrets],
    }
    pod = {"spec": {name: value for name, value in spec.items() if value}}
    return {"template": {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": pod}}}]}}}


class Stopped(BaseException):
    """This task was told to end."""


class TrainJob:
    """A job of ours on the cluster."""

    def __init__(self, here: Here, body: dict[str, Any]) -> None:
        self.here, self.body, self.name = here, body, body["metadata"]["name"]
        self.reference = TRAIN_JOBS | {"namespace": here.namespace, "name": self.name}

    def carry_out(self, pending_seconds: float) -> None:
        """Makes the job or finds it again, follows it to its end, deletes it.

        A task that is taken off its node leaves the job to the task that is started in its place; one whose run is
        ended takes the job with it.
        """
        keep = False
        try:
            with _interruptible():
                self.start()
                self.follow(pending_seconds)
        except Stopped:
            keep = not self.here.run_is_ending()
            what = "goes on, for the task that is started in this one's place" if keep else "is deleted with its run"
            raise StageError(f"update was told to stop; TrainJob {self.name} {what}") from None
        finally:
            if not keep:
                self.delete()

    def get(self) -> dict[str, Any] | None:
        """The job as the cluster has it."""
        api = self.here.custom
        try:
            return call("read the TrainJob", lambda: api.get_namespaced_custom_object(**self.reference))
        except ClusterError as error:
            if status_of(error.__cause__ or error) == 404:
                return None
            raise

    def start(self) -> None:
        """Makes the job. One that goes on is taken up again; one that failed is replaced."""
        deadline = time.monotonic() + GONE_SECONDS
        while not self._create():
            found = self.get()
            if found is None:
                continue
            if "deletionTimestamp" not in found["metadata"]:
                if state(found) != "Failed":
                    log.info("TrainJob %s goes on from an earlier attempt", self.name)
                    return
                self.delete()
            if time.monotonic() > deadline:
                raise StageError(f"TrainJob {self.name} of an earlier attempt is not gone after {GONE_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        log.info("TrainJob %s: %d nodes", self.name, self.body["spec"]["trainer"]["numNodes"])

    def _create(self) -> bool:
        """False when there is a job of that name."""
        api, to = self.here.custom, TRAIN_JOBS | {"namespace": self.here.namespace}
        try:
            call("create the TrainJob", lambda: api.create_namespaced_custom_object(**to, body=self.body))
        except ClusterError as error:
            status = status_of(error.__cause__ or error)
            if status == 404:
                raise StageError(
                    "update.nodes needs Kubeflow Trainer, and this cluster has no TrainJobs: "
                    "kubectl apply --server-side -k k8s/third-party/trainer"
                ) from None
            if status != 409:
                raise
            return False
        return True

    def follow(self, pending_seconds: float) -> None:
        """Shows the first node's log until the job has ended.

        Raises:
            StageError: it failed, is gone, or its nodes cannot start.
        """
        follower, told, hindered = LogFollower(self.here, self.name), "", 0.0
        try:
            while True:
                found = self.get()
                if found is None:
                    raise StageError(f"TrainJob {self.name} was deleted while it ran; `grpo cancel` or kubectl did that")
                if state(found) == "Complete":
                    return
                pods = self.here.pods(self.name)
                if state(found) == "Failed":
                    raise StageError(f"TrainJob {self.name} failed: {reason(found)}{last_words(self.here, self.name)}")
                follower.attend(pods)
                trouble = "queued: it waits for Kueue" if state(found) == "Suspended" else node_troubles(self.here, pods)
                if trouble and trouble != told:
                    log.warning("TrainJob %s: %s", self.name, trouble)
                stuck = bool(trouble) and state(found) != "Suspended"
                hindered = (hindered or time.monotonic()) if stuck else 0.0
                if stuck and time.monotonic() - hindered > pending_seconds:
                    raise StageError(f"TrainJob {self.name} could not start for {pending_seconds:.0f} s: {trouble}")
                told = trouble
                time.sleep(POLL_SECONDS)
        finally:
            follower.stop()

    def delete(self) -> None:
        """Deletes the job and its pods; fine when it is gone."""
        api = self.here.custom
        remove = lambda: api.delete_namespaced_custom_object(**self.reference, propagation_policy="Foreground")  # noqa: E731
        try:
            call("delete the TrainJob", remove)
        except ClusterError as error:
            if status_of(error.__cause__ or error) != 404:
                log.warning("TrainJob %s stays, and the janitor will come for it: %s", self.name, error)


def state(job: dict[str, Any]) -> str:
    """`Complete`, `Failed`, `Suspended`, or blank while it runs."""
    held = [entry["type"] for entry in job.get("status", {}).get("conditions", []) if entry["status"] == "True"]
    return next((name for name in ("Complete", "Failed", "Suspended") if name in held), "")


def reason(job: dict[str, Any]) -> str:
    """What the failed job's condition says."""
    found = [entry for entry in job["status"]["conditions"] if entry["type"] == "Failed"]
    told = f"{found[0].get('reason', '')}: {found[0].get('message', '')}"
    return told + (" (cluster.update.timeout_minutes is up)" if found[0].get("reason") == "DeadlineExceeded" else "")


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM raises Stopped in the main thread."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

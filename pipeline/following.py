"""A run on the cluster as it goes on: its tasks, the log of a stage, and ending it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from components.common.kube import STAGE_LABEL, TRAIN_JOB_RUN_LABEL, TRAIN_JOBS, troubles
from pipeline.connection import ClusterError, call, status_of
from pipeline.submitting import TERMINAL

POLL_SECONDS = 5.0
RUN_LABEL = "pipeline/runid"
DRIVER_NAMES = ("-dag-driver", "-container-driver", "root-driver", "root", "-driver")
"""Endings of task names that are Kubeflow's own, not ours."""


@dataclass(frozen=True)
class Task:
    """A task of a run: its name in the graph, and how it is."""

    name: str
    state: str
    error: str


def tasks_of(run: Any) -> list[Task]:
    """Our tasks of a run, in the order they began."""
    details = (run.run_details.task_details if run.run_details else None) or []
    found = []
    for detail in sorted(details, key=lambda detail: str(detail.start_time or detail.create_time or "")):
        name = detail.display_name or ""
        if name.endswith(DRIVER_NAMES):
            continue
        message = detail.error.message if detail.error else ""
        found.append(Task(name, detail.state or "PENDING", message or ""))
    return found


def follow(client: Any, run_id: str, *, poll_seconds: float = POLL_SECONDS) -> Iterator[tuple[Any, list[Task]]]:
    """The run and its tasks again and again, until it has ended."""
    while True:
        run = call("read the run", client.get_run, run_id)
        yield run, tasks_of(run)
        if run.state in TERMINAL:
            return
        time.sleep(poll_seconds)


@dataclass(frozen=True)
class Pods:
    """The pods and TrainJobs of runs, through the Kubernetes API."""

    namespace: str

    @staticmethod
    def connect(namespace: str | None) -> "Pods":
        """With the kubeconfig, or a pod's own identity.

        Raises:
            ClusterError: neither is there.
        """
        from kubernetes import config

        try:
            config.load_config()
        except config.ConfigException:
            raise ClusterError("no cluster: there is neither a kubeconfig nor a pod's identity") from None
        return Pods(namespace or "kubeflow")

    def of_stage(self, run_id: str, stage: str) -> list[Any]:
        """Pods of a stage, oldest first."""
        from kubernetes import client

        selector = f"{RUN_LABEL}={run_id},{STAGE_LABEL}={stage}"
        found = call("list the pods", client.CoreV1Api().list_namespaced_pod, self.namespace, label_selector=selector)
        return sorted(found.items, key=lambda pod: str(pod.metadata.creation_timestamp))

    def log(self, run_id: str, stage: str, *, tail: int | None = None) -> Iterator[str]:
        """Log of the newest pod of a stage, line by line; what went wrong with the pod where it has none.

        Raises:
            ClusterError: no pod of that stage is left.
        """
        from kubernetes import client

        pods = self.of_stage(run_id, stage)
        if not pods:
            raise ClusterError(
                f"run {run_id} has no pod of {stage} left: it has not started, or Kubernetes has cleaned it up; "
                "its log is in the Kubeflow UI when the installation archives logs"
            )
        pod = pods[-1]
        yield from (f"({trouble})" for trouble in troubles(pod))
        options = {"container": "main"} | ({"tail_lines": tail} if tail else {})
        try:
            text = call(
                "read the log",
                client.CoreV1Api().read_namespaced_pod_log,
                pod.metadata.name,
                self.namespace,
                **options,
            )
        except ClusterError as error:
            if status_of(error) in (400, 404):  # not started yet, or gone meanwhile
                yield f"(pod {pod.metadata.name} has no log: {error})"
                return
            raise
        yield from text.splitlines()

    def delete_train_jobs(self, run_id: str) -> list[str]:
        """Deletes the TrainJobs of a run; gives their names. None where Kubeflow Trainer is not installed."""
        from kubernetes import client

        api = client.CustomObjectsApi()
        try:
            found = call(
                "list the TrainJobs",
                api.list_namespaced_custom_object,
                **TRAIN_JOBS,
                namespace=self.namespace,
                label_selector=f"{TRAIN_JOB_RUN_LABEL}={run_id}",
            )
        except ClusterError as error:
            if status_of(error) == 404:
                return []
            raise
        names = [item["metadata"]["name"] for item in found["items"]]
        for name in names:
            call("delete the TrainJob", _delete, api, self.namespace, name)
        return names


def _delete(api: Any, namespace: str, name: str) -> None:
    try:
        api.delete_namespaced_custom_object(
            **TRAIN_JOBS, namespace=namespace, name=name, propagation_policy="Foreground"
        )
    except Exception as error:
        if status_of(error) != 404:  # it ended by itself meanwhile
            raise


def cancel(client: Any, pods: Pods, run_id: str) -> list[str]:
    """Ends a run and everything it started; gives the names of the TrainJobs that were deleted."""
    run = call("read the run", client.get_run, run_id)
    if run.state not in TERMINAL:
        call("end the run", client.terminate_run, run_id)
    return pods.delete_train_jobs(run_id)

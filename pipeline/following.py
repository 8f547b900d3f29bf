"""A run on the cluster as it goes on: its tasks, the log of a stage, and ending it."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from time import monotonic, sleep
from typing import Any

from components.common.errors import SettingsError
from components.common.kube import STAGE_LABEL, TRAIN_JOB_RUN_LABEL, TRAIN_JOBS, troubles
from components.common.podlog import PodLog
from pipeline.connection import ClusterError, call, status_of
from pipeline.resources import STAGES
from pipeline.submitting import TERMINAL

POLL_SECONDS = 5.0
OUTAGE_SECONDS = 300.0
"""Longest time without an answer about a pod whose log is followed."""
RUN_LABEL = "pipeline/runid"
TASK = re.compile(rf"({'|'.join(STAGES)}|submit)(?:-shards|[- ]next)?(?: (\d+)|-(\d+))?")
"""A task of ours by its key in the IR (`update-2`), which is what Kubeflow 2.17 reports, or by its name in the graph
(`update 1`). All else is Kubeflow's own: `root`, `executor`, `update-2-driver`, `for-loop-2`."""
ORDER = ("FAILED", "CANCELED", "RUNNING", "CANCELING", "PAUSED", "PENDING", "SUCCEEDED", "SKIPPED")
"""Which state speaks for the members of a loop, which have one name."""


@dataclass(frozen=True)
class Task:
    """A task of a run: its name in the graph, and how it is."""

    name: str
    stage: str
    iteration: int | None
    """As the run counts, from 0; None for what is done once."""
    state: str
    error: str = ""
    began: datetime | None = None
    ended: datetime | None = None


def tasks_of(run: Any) -> list[Task]:
    """Our tasks of a run, in the order they began."""
    details = (run.run_details.task_details if run.run_details else None) or []
    found: dict[str, Task] = {}
    for detail in sorted(details, key=lambda detail: str(detail.start_time or detail.create_time or "")):
        task = _task(detail)
        if task is None:
            continue
        other = found.get(task.name, task)
        found[task.name] = min(task, other, key=lambda task: ORDER.index(task.state))
    return list(found.values())


def _task(detail: Any) -> Task | None:
    match = TASK.fullmatch(detail.display_name or "")
    if match is None:
        return None
    stage, shown, key = match.groups()
    iteration = None
    if stage in ("rollout", "reward", "update", "evaluate"):
        iteration = int(shown) if shown else int(key or 1) - 1
    name = "submit next" if stage == "submit" else stage if iteration is None else f"{stage} {iteration}"
    error = (detail.error.message if detail.error else "") or ""
    state = detail.state if detail.state in ORDER else "PENDING"
    return Task(name, stage, iteration, state, error, detail.start_time, detail.end_time)


def follow(client: Any, run_id: str, *, poll_seconds: float = POLL_SECONDS) -> Iterator[tuple[Any, list[Task]]]:
    """The run and its tasks again and again, until it has ended."""
    while True:
        run = call("read the run", client.get_run, run_id)
        yield run, tasks_of(run)
        if run.state in TERMINAL:
            return
        sleep(poll_seconds)


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

    def of_run(self, run_id: str, stage: str | None = None) -> list[Any]:
        """Pods of a run, or of one of its stages, oldest first."""
        from kubernetes import client

        selector = f"{RUN_LABEL}={run_id}" + (f",{STAGE_LABEL}={stage}" if stage else "")
        found = call("list the pods", client.CoreV1Api().list_namespaced_pod, self.namespace, label_selector=selector)
        return sorted(found.items, key=lambda pod: str(pod.metadata.creation_timestamp))

    def log(self, run_id: str, stage: str, *, tail: int | None = None) -> Iterator[str]:
        """Log of the newest pod of a stage, line by line; what went wrong with the pod where it has none.

        Raises:
            ClusterError, SettingsError: as `newest`.
        """
        pod = self.newest(run_id, stage)
        yield from (f"({trouble})" for trouble in troubles(pod))
        yield from self.log_of(pod, tail=tail)

    def log_as_it_grows(self, run_id: str, stage: str) -> Iterator[str]:
        """Log of the newest pod of a stage until the pod ends; until it starts, what keeps it from it.

        Raises:
            ClusterError: as `newest`, or the log may not be read.
            SettingsError: as `newest`.
        """
        from kubernetes import client

        found, heard = self.newest(run_id, stage), monotonic()
        name, told = found.metadata.name, set[str]()

        def look() -> str:
            """Its phase, blank when it is gone; the last one known for as long as a server may be away."""
            nonlocal found, heard
            try:
                pods = self.of_run(run_id, stage)
            except ClusterError as error:
                if status_of(error) in (401, 403) or monotonic() - heard > OUTAGE_SECONDS:
                    raise
            else:
                found, heard = next((pod for pod in pods if pod.metadata.name == name), None), monotonic()
            return found.status.phase if found else ""

        def news() -> Iterator[str]:
            for line in [f"({trouble})" for trouble in troubles(found)] if found else [f"(pod {name} is gone)"]:
                if line not in told:
                    told.add(line)
                    yield line

        yield from news()
        while look() == "Pending":
            yield from news()
            sleep(POLL_SECONDS)
        if found:
            log = PodLog(client.CoreV1Api(), self.namespace, name, "main")
            yield from log.follow(lambda: look() in ("", "Succeeded", "Failed"))
        yield from news()

    def newest(self, run_id: str, stage: str) -> Any:
        """The newest pod of a stage.

        Raises:
            ClusterError: no pod of that stage is left.
            SettingsError: there is no such stage.
        """
        if stage not in STAGES:
            near = difflib.get_close_matches(stage, STAGES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(STAGES)}"
            raise SettingsError(f"no stage {stage}; {hint}")
        pods = self.of_run(run_id, stage)
        if not pods:
            raise ClusterError(
                f"run {run_id} has no pod of {stage} left: it has not started, or Kubernetes has cleaned it up; "
                "its log is in the Kubeflow UI when the installation archives logs"
            )
        return pods[-1]

    def log_of(self, pod: Any, *, tail: int | None = None) -> Iterator[str]:
        """Log of a pod, line by line."""
        from kubernetes import client

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


def cancel(client: Any, run_id: str) -> None:
    """Ends a run; what its pods have started outlives it until `Pods.delete_train_jobs` or the janitor."""
    run = call("read the run", client.get_run, run_id)
    if run.state not in TERMINAL:
        call("end the run", client.terminate_run, run_id)

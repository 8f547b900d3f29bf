"""One update on several machines: a Kubeflow TrainJob, made, followed and deleted by the task of the pipeline.

The task's own pod needs no GPU. The job's name derives from the work, so a task that is started again finds the job it
had made; the Workflow owns the job, so it goes with the run.
"""

import logging
import os
import time
from typing import Any

from components.common.errors import StageError
from components.common.kube import TRAIN_JOBS, ClusterError, call, status_of
from components.common.signals import raising_on_sigterm
from components.common.stage import Stage
from components.update import remote
from components.update.cluster import Here
from components.update.config import UpdateSettings
from components.update.jobspec import NodeResources, describe
from components.update.watching import LogFollower, last_words, node_troubles

RESOURCES_VARIABLE = "GRPO_UPDATE_NODES"
"""The task's environment variable with the nodes' resources, as JSON; the compiled pipeline sets it."""
POLL_SECONDS = 5.0
GONE_SECONDS = 300.0
"""How long a deleted job may take to be gone: its nodes have two minutes to end."""
OUTAGE_SECONDS = 900.0
"""How long the Kubernetes API may fail while the job runs on."""

log = logging.getLogger("grpo")


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
    here, node = Here.find(), NodeResources.model_validate_json(text)
    job = TrainJob(here, describe(stage, node, here, remote.leave(stage)))
    job.carry_out(node.pending_seconds)
    stage.store.delete(remote.task_key(stage))
    if not stage.adopt():
        raise StageError(f"TrainJob {job.name} ended well and published nothing; look at the log of its first node")


class Stopped(BaseException):
    """This task was told to end."""


class Watch:
    """Tells what keeps a job from starting, once, and ends the wait when that lasts too long."""

    def __init__(self, job: str, seconds: float) -> None:
        self.job, self.seconds = job, seconds
        self.told, self.since = "", 0.0

    def waits(self, trouble: str, *, may_last: bool) -> None:
        """`trouble`: what is wrong now, blank when nothing is."""
        if trouble and trouble != self.told:
            log.warning("TrainJob %s: %s", self.job, trouble)
        self.told = trouble
        if may_last or not trouble:
            self.since = 0.0
            return
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.seconds:
            raise StageError(f"TrainJob {self.job} could not start for {self.seconds:.0f} s: {trouble}")


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
            with raising_on_sigterm(Stopped):
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
            if status_of(error) == 404:
                return None
            raise

    def start(self) -> None:
        """Makes the job. One that goes on is taken up again; one that failed is replaced."""
        deadline = time.monotonic() + GONE_SECONDS
        while not self._create():
            found = self.get()
            if found is not None and "deletionTimestamp" not in found["metadata"]:
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
            status = status_of(error)
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
            ClusterError: the Kubernetes API has failed for too long.
        """
        follower, watch = LogFollower(self.here, self.name), Watch(self.name, pending_seconds)
        answered = time.monotonic()
        try:
            while True:
                try:
                    if self._look(follower, watch):
                        return
                    answered = time.monotonic()
                except ClusterError as error:  # the job runs on without the API server
                    refused = status_of(error) in (401, 403)
                    if refused or time.monotonic() - answered > OUTAGE_SECONDS:
                        raise
                    log.warning("TrainJob %s: %s", self.name, error)
                time.sleep(POLL_SECONDS)
        finally:
            follower.stop()

    def _look(self, follower: LogFollower, watch: "Watch") -> bool:
        """Whether it has ended well."""
        found = self.get()
        if found is None:
            raise StageError(f"TrainJob {self.name} was deleted while it ran, by `grpo cancel` or by kubectl")
        if state(found) == "Failed":
            raise StageError(f"TrainJob {self.name} failed: {reason(found)}{last_words(self.here, self.name)}")
        pods = self.here.pods(self.name)
        follower.attend(pods)
        if state(found) == "Suspended":
            watch.waits("it waits in the queue, until Kueue admits it", may_last=True)
        elif state(found) != "Complete":
            watch.waits(node_troubles(self.here, self.name, pods), may_last=False)
        return state(found) == "Complete"

    def delete(self) -> None:
        """Deletes the job and its pods; fine when it is gone."""
        api = self.here.custom
        remove = lambda: api.delete_namespaced_custom_object(**self.reference, propagation_policy="Foreground")  # noqa: E731
        try:
            call("delete the TrainJob", remove)
        except ClusterError as error:
            if status_of(error) != 404:
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

"""Deletes TrainJobs whose run has ended: what a run that was ended from outside could not clear away itself.

python -m pipeline.janitor --namespace NAMESPACE [--grace-minutes 10] [--dry-run]

`k8s/base/runs/janitor.yaml` runs it every few minutes. Only TrainJobs (trainer.kubeflow.org) with our
label are looked at.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from components.common.errors import GrpoError
from components.common.kube import PART_OF, TRAIN_JOBS, WORKFLOWS, ClusterError, call, status_of

ENDED = ("Succeeded", "Failed", "Error")
PAGE_SIZE = 100


@dataclass(frozen=True)
class Verdict:
    """What becomes of a TrainJob, and why."""

    name: str
    delete: bool
    why: str


def clean(namespace: str, *, grace: timedelta, dry_run: bool, now: datetime | None = None) -> Iterator[Verdict]:
    """Judges every TrainJob of ours; deletes those whose Workflow is gone or ended when they are older than `grace`.

    A job that cannot be judged is left, and the next one looked at; the error is raised in the end.

    Raises:
        ClusterError: Kubernetes refused.
    """
    from kubernetes import client

    api, now, problems = client.CustomObjectsApi(), now or datetime.now(UTC), []
    for job in _train_jobs(api, namespace):
        try:
            verdict = _judge(api, namespace, job, now - grace)
            if verdict.delete and not dry_run:
                _delete(api, namespace, verdict.name)
        except ClusterError as error:
            problems.append(error)
            continue
        yield verdict
    if problems:
        raise problems[0]


def _train_jobs(api: Any, namespace: str) -> Iterator[dict[str, Any]]:
    """Ours, page by page; none where Kubeflow Trainer is not installed."""
    (label,) = PART_OF.items()
    where = TRAIN_JOBS | {"namespace": namespace, "label_selector": "=".join(label), "limit": PAGE_SIZE}
    token = ""
    while True:
        to = where | ({"_continue": token} if token else {})
        try:
            page = call("list the TrainJobs", lambda to=to: api.list_namespaced_custom_object(**to))
        except ClusterError as error:
            if status_of(error) == 404:
                return
            raise
        yield from page["items"]
        token = page.get("metadata", {}).get("continue", "")
        if not token:
            return


def _judge(api: Any, namespace: str, job: dict[str, Any], before: datetime) -> Verdict:
    """The job's Workflow is told by its owner reference; without one there is no run to wait for."""
    metadata = job["metadata"]
    name = metadata["name"]
    if "deletionTimestamp" in metadata:
        return Verdict(name, False, "is being deleted")
    if datetime.fromisoformat(metadata["creationTimestamp"]) > before:
        return Verdict(name, False, "is younger than the grace period")
    owner = next((entry for entry in metadata.get("ownerReferences", []) if entry["kind"] == "Workflow"), None)
    if owner is None:
        return Verdict(name, True, "has no Workflow as owner")
    workflow = _workflow(api, namespace, owner["name"])
    if workflow is None or workflow["metadata"].get("uid", owner["uid"]) != owner["uid"]:
        return Verdict(name, True, f"Workflow {owner['name']} is gone")
    phase = workflow.get("status", {}).get("phase", "")
    if phase in ENDED:
        return Verdict(name, True, f"Workflow {owner['name']} has ended: {phase}")
    return Verdict(name, False, f"Workflow {owner['name']} goes on")


def _workflow(api: Any, namespace: str, name: str) -> dict[str, Any] | None:
    try:
        return call(
            "read the Workflow",
            lambda: api.get_namespaced_custom_object(**WORKFLOWS, namespace=namespace, name=name),
        )
    except ClusterError as error:
        if status_of(error) == 404:
            return None
        raise


def _delete(api: Any, namespace: str, name: str) -> None:
    to = TRAIN_JOBS | {"namespace": namespace, "name": name, "propagation_policy": "Foreground"}
    try:
        call("delete the TrainJob", lambda: api.delete_namespaced_custom_object(**to))
    except ClusterError as error:
        if status_of(error) != 404:  # it went by itself meanwhile
            raise


def main(arguments: list[str] | None = None) -> None:
    """Prints a line a TrainJob; status 1 when something could not be done."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.janitor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--namespace", required=True, help="Namespace of the runs.")
    parser.add_argument("--grace-minutes", type=float, default=10.0, help="Age below which a TrainJob is left alone.")
    parser.add_argument("--dry-run", action="store_true", help="Only say what would be deleted.")
    given = parser.parse_args(arguments)
    from kubernetes import config

    try:
        config.load_config()
        count = 0
        for verdict in clean(given.namespace, grace=timedelta(minutes=given.grace_minutes), dry_run=given.dry_run):
            what = ("would be deleted" if given.dry_run else "deleted") if verdict.delete else "kept"
            print(f"TrainJob {verdict.name} {what}: {verdict.why}", flush=True)
            count += verdict.delete
        print(f"{count} TrainJobs {'to delete' if given.dry_run else 'deleted'} in {given.namespace}")
    except config.ConfigException:
        print("error: no cluster: there is neither a kubeconfig nor a pod's identity", file=sys.stderr)
        raise SystemExit(1) from None
    except GrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

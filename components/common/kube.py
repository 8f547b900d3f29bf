"""Calls of Kubeflow Pipelines and Kubernetes: asked again when the server is busy, explained when it refuses."""

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from components.common.errors import GrpoError

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5
TRAIN_JOBS = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
WORKFLOWS = {"group": "argoproj.io", "version": "v1alpha1", "plural": "workflows"}
TRAIN_JOB_RUN_LABEL = "grpo-pipeline/run"
"""Label of a TrainJob with the id of the run it belongs to."""
STAGE_LABEL = "app.kubernetes.io/component"
PART_OF = {"app.kubernetes.io/part-of": "grpo-pipeline"}
"""Label of everything of ours."""

T = TypeVar("T")


class ClusterError(GrpoError):
    """Kubeflow Pipelines or Kubernetes refused or cannot be reached."""


def call(what: str, request: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Makes a request; busy and broken servers are asked again, with growing pauses.

    Raises:
        ClusterError: refused, or still failing after some attempts; the message says how to mend it.
    """
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request(*arguments, **options)
        except Exception as error:  # kfp, kubernetes and urllib3 have no common base
            if attempt == ATTEMPTS or not _passing(error):
                raise explain(error, what) from error
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def make_once(what: str, make: Callable[[], T], find: Callable[[], T | None]) -> T:
    """Makes what must not be there twice; `find` looks for it before each attempt, since an answer can be lost.

    Raises:
        ClusterError: as `call`.
    """
    try:
        return call(what, lambda: find() or make())
    except ClusterError as error:
        found = find() if status_of(error) == 409 else None  # another was quicker
        if found is None:
            raise
        return found


def status_of(error: BaseException) -> int | None:
    """HTTP status of a client's exception, or of the one that a ClusterError explains; None where there is none."""
    if isinstance(error, ClusterError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(error, "status", None)
    return status if isinstance(status, int) and status > 0 else None


def _passing(error: BaseException) -> bool:
    if isinstance(error, GrpoError):  # explained already, and asked again by whoever explained it
        return False
    status = status_of(error)
    return status == 429 or (status is not None and status >= 500) or (status is None and _is_network(error))


def _is_network(error: BaseException) -> bool:
    import urllib3

    return isinstance(error, urllib3.exceptions.HTTPError | ConnectionError | TimeoutError)


def explain(error: BaseException, what: str) -> GrpoError:
    """The error a user gets for a client's exception."""
    if isinstance(error, GrpoError):
        return error
    status, told = status_of(error), _told(error)
    mends = {
        401: "the token or cookie is missing or expired: log in again and pass --token or --cookie",
        403: "forbidden: the account lacks a right; `grpo doctor` names it, and the command that grants it",
        404: "not found: check the name and --namespace",
        409: "it is there already: choose another name, or wait until the other is gone",
        429: "the server is busy: try again in a minute",
    }
    if status is None:
        return ClusterError(
            f"cannot {what}: {told}; check --host and the network (`grpo doctor` tells what is reachable)"
        )
    if status == 403 and "exceeded quota" in told:
        mends[403] = "a ResourceQuota is used up: wait for other runs to end, or raise it (docs/operations.md)"
    failed = "the server failed: look at the logs of ml-pipeline in the kubeflow namespace"
    mend = mends.get(status, failed if status >= 500 else "refused")
    return ClusterError(f"cannot {what}: HTTP {status}, {mend} ({told})")


def _told(error: BaseException) -> str:
    body = getattr(error, "body", None)
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        values = json.loads(text or "")
        found = values.get("error_message") or values.get("message") or values.get("error") or text
    except (json.JSONDecodeError, AttributeError):
        found = text or str(error) or type(error).__name__
    return " ".join(str(found).split())[:300]


def troubles(pod: Any) -> Iterator[str]:
    """Why a pod does not run: unschedulable, image not pulled, killed for memory."""
    stage = (pod.metadata.labels or {}).get(STAGE_LABEL, "<stage>").removesuffix("-node")
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            told = condition.message or condition.reason or ""
            yield f"{pod.metadata.name} is not scheduled: {told}{_placement_mend(told, stage)}"
    for container in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
        waiting = container.state.waiting if container.state else None
        ended = container.state.terminated if container.state else None
        if waiting and waiting.reason not in ("PodInitializing", "ContainerCreating"):
            yield f"{container.name}: {waiting.reason}: {waiting.message or ''}{_image_mend(waiting.reason, container)}"
        if ended and ended.reason == "OOMKilled":
            yield f"{container.name} was killed for memory: raise cluster.{stage}.memory"


def _image_mend(reason: str, container: Any) -> str:
    if "Image" not in (reason or ""):
        return ""
    return f" (image {container.image}: is it in the registry, and are cluster.image_pull_secrets right?)"


def _placement_mend(told: str, stage: str) -> str:
    """What to change in the settings, by what the scheduler says."""
    taints = re.findall(r"untolerated taint(?:\(s\))? \{([^:}]+)", told)
    short = re.findall(r"Insufficient ([\w./-]*\w)", told)
    mends = [f'cluster.{stage}.tolerations = [{{ key = "{taint}" }}] accepts that taint' for taint in taints]
    mends += [f"{name} is short: lower cluster.{stage}'s request, or enlarge the pool" for name in dict.fromkeys(short)]
    if "node affinity" in told or "node selector" in told:
        mends.append(f"no node has the labels of cluster.{stage}.gpu_type and node_selector")
    return f" ({'; '.join(mends)})" if mends else ""

"""Where this task runs: its pod, the Workflow that owns it, the Kubernetes API."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.errors import StageError
from components.common.kube import WORKFLOWS, ClusterError, call, status_of

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
RUN_LABEL, WORKFLOW_LABEL = "pipeline/runid", "workflows.argoproj.io/workflow"
JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""Label of a TrainJob's pods with the job's name."""


@dataclass(frozen=True)
class Here:
    """A pod of a run."""

    core: Any
    custom: Any
    namespace: str
    run_id: str
    owner: dict[str, Any]
    """Owner reference to the run's Workflow."""

    @staticmethod
    def find() -> "Here":
        """From the pod's name, its labels and owner.

        Raises:
            StageError: not in a pod of a run.
            ClusterError: Kubernetes refused.
        """
        from kubernetes import client, config

        try:
            config.load_config()
        except config.ConfigException:
            raise StageError(
                "update.nodes above 1 needs Kubernetes, and this process is in no pod; set update.nodes = 1"
            ) from None
        core, custom, namespace = client.CoreV1Api(), client.CustomObjectsApi(), _namespace()
        name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
        selector = f"metadata.name={name}"
        found = call("find this pod", lambda: core.list_namespaced_pod(namespace, field_selector=selector)).items
        if not found:
            raise StageError(f"no pod {name} in namespace {namespace}: update.nodes above 1 needs a run on a cluster")
        labels = found[0].metadata.labels or {}
        owner = _owner(custom, namespace, found[0])
        return Here(core, custom, namespace, labels.get(RUN_LABEL) or owner["uid"], owner)

    def pods(self, job: str) -> list[Any]:
        """The job's pods, in the order of their node numbers."""
        selector = f"{JOB_LABEL}={job}"
        listed = call("list the nodes", lambda: self.core.list_namespaced_pod(self.namespace, label_selector=selector))
        return sorted(listed.items, key=node_number)

    def run_is_ending(self) -> bool:
        """Whether the Workflow was told to end, has ended, or is gone; False too when nobody can tell."""
        from kubernetes.client.exceptions import ApiException

        name = self.owner["name"]
        try:
            workflow = self.custom.get_namespaced_custom_object(**WORKFLOWS, namespace=self.namespace, name=name)
        except ApiException as error:
            return error.status == 404
        spec, phase = workflow.get("spec", {}), workflow.get("status", {}).get("phase")
        return spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown")) or phase in ("Failed", "Error")


def node_number(pod: Any) -> int:
    """Number of a node, from 0."""
    return int((pod.metadata.labels or {}).get("batch.kubernetes.io/job-completion-index", 0))


def _namespace() -> str:
    if NAMESPACE_FILE.exists():
        return NAMESPACE_FILE.read_text().strip()
    from kubernetes import config

    return config.list_kube_config_contexts()[1]["context"].get("namespace", "default")


def _owner(custom: Any, namespace: str, pod: Any) -> dict[str, Any]:
    """Reference to the Workflow, from the pod's owners; from its label where another object stands between."""
    for owner in pod.metadata.owner_references or []:
        if owner.kind == "Workflow":
            return _reference(owner.name, owner.uid)
    name = (pod.metadata.labels or {}).get(WORKFLOW_LABEL)
    if name is None:
        raise StageError(f"pod {pod.metadata.name} belongs to no Workflow: update.nodes above 1 needs a run of KFP")
    try:
        read = lambda: custom.get_namespaced_custom_object(**WORKFLOWS, namespace=namespace, name=name)  # noqa: E731
        return _reference(name, call("read the Workflow", read)["metadata"]["uid"])
    except ClusterError as error:
        if status_of(error) == 404:
            raise StageError(f"Workflow {name} is gone: the run was deleted") from None
        raise


def _reference(name: str, uid: str) -> dict[str, Any]:
    return {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": name, "uid": uid}

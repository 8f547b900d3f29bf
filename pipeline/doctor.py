"""What a run needs, checked from here: each finding with the command that mends it.

Without a cluster, what does not need one is still checked: settings, images, storage, tracking.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from components.common.errors import GrpoError
from components.common.kube import ClusterError
from pipeline.connection import Connection
from pipeline.resources import STAGES, ClusterSettings
from pipeline.settings import PipelineSettings

REFERENCE = re.compile(
    r"^(?:[a-z0-9]+(?:[.-][a-z0-9]+)*(?::\d+)?/)?[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
    r"(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?$"
)
"""An image reference, as the distribution specification defines it."""
TIMEOUT_SECONDS = 10
FORWARD = "kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80, then --host http://localhost:8080"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    state: Literal["ok", "warning", "failure"]
    what: str
    detail: str = ""
    mend: str = ""

    def line(self) -> str:
        """For a terminal."""
        mark = {"ok": "OK     ", "warning": "warning", "failure": "FAILED "}[self.state]
        text = f"{mark}  {self.what}" + (f": {self.detail}" if self.detail else "")
        return text + (f"\n         → {self.mend}" if self.mend else "")


def examine(settings: PipelineSettings | None, connection: Connection) -> Iterator[Finding]:
    """Checks everything, one finding after the other; never raises for what is missing."""
    from pipeline.doctor_cluster import examine_cluster

    if settings is None:
        yield Finding("warning", "settings", "no file given: images, storage and pools are not checked",
                      "grpo doctor settings.toml")  # fmt: skip
    else:
        yield from images(settings.cluster)
        yield from compile_cache(settings)
        yield from storage(settings.store, connection.store_endpoint)
        yield from tracking(settings)
    yield from kubeflow(connection)
    yield from examine_cluster(settings, connection.namespace or "kubeflow")


def images(cluster: ClusterSettings) -> Iterator[Finding]:
    """Whether each stage has a well-formed, pinned image."""
    from pipeline.images import image_of

    for stage in STAGES:
        try:
            image = image_of(stage, cluster)
        except GrpoError as error:
            yield Finding("failure", f"image of {stage}", str(error), "make images REGISTRY=... TAG=...")
            continue
        found = REFERENCE.match(image)
        if found is None:
            yield Finding("failure", f"image of {stage}", f"{image!r} is not an image reference",
                          f"--set cluster.{stage}.image=registry/name@sha256:...")  # fmt: skip
        elif found["digest"]:
            yield Finding("ok", f"image of {stage}", image)
        else:
            kind, tag = ("failure", "latest") if found["tag"] in (None, "latest") else ("warning", found["tag"])
            yield Finding(kind, f"image of {stage}", f"{image}: the tag {tag} may come to mean another image",
                          "make images REGISTRY=... TAG=... pins by digest")  # fmt: skip


def compile_cache(settings: PipelineSettings) -> Iterator[Finding]:
    """Whether what vLLM compiles on GPUs outlives the pod that compiled it."""
    rollout, pod = settings.rollout, settings.cluster.rollout
    compiles = pod.gpus and rollout.engine in ("auto", "vllm") and not rollout.vllm.enforce_eager
    if compiles and not (pod.cache_claim or rollout.vllm.cache_dir):
        yield Finding("warning", "compile cache", "every rollout compiles anew: /cache ends with its pod",
                      "--set cluster.rollout.cache_claim=CLAIM, or rollout.vllm.enforce_eager=true")  # fmt: skip


def storage(url: str, endpoint: str | None = None) -> Iterator[Finding]:
    """Whether the bucket can be written to, and keeps what the pipeline relies on."""
    from components.common.probe import probe
    from pipeline.reaching import OutOfReach, open_from_here

    if not url.startswith("s3://"):
        yield Finding("failure", "storage", f"a pod cannot see {url}", "--set store=s3://bucket/prefix?endpoint=...")
        return
    try:
        for found in probe(open_from_here(url, endpoint)):
            state: Literal["ok", "warning", "failure"] = "failure" if found.needed else "warning"
            yield Finding("ok" if found.good else state, f"storage, {found.name}", found.detail)
    except OutOfReach as error:  # the pods may well reach it
        yield Finding("warning", "storage", f"was not tried: {error}")
    except GrpoError as error:
        yield Finding("failure", "storage", str(error), "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set here?")


def tracking(settings: PipelineSettings) -> Iterator[Finding]:
    """Whether MLflow answers, where it is to be reached from here."""
    import os

    if not settings.tracking.enabled:
        yield Finding("ok", "MLflow", "switched off")
        return
    uri = settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if urlsplit(uri).scheme not in ("http", "https"):
        yield Finding("warning", "MLflow", f"no server is named here ({uri or 'unset'}); the pods take grpo-config's",
                      "--set tracking.uri=http://mlflow.grpo-tracking:5000")  # fmt: skip
        return
    yield _answers(uri)


def _answers(uri: str) -> Finding:
    import urllib3

    try:
        answer = urllib3.PoolManager(retries=False).request("GET", f"{uri.rstrip('/')}/health", timeout=TIMEOUT_SECONDS)
    except urllib3.exceptions.HTTPError as error:
        return Finding("warning", "MLflow", f"{uri} cannot be reached from here ({type(error).__name__})",
                       "kubectl -n grpo-tracking get pods; runs go on without it")  # fmt: skip
    if answer.status != 200:
        mend = "kubectl -n grpo-tracking logs deploy/mlflow"
        return Finding("warning", "MLflow", f"{uri} answers HTTP {answer.status}", mend)
    return Finding("ok", "MLflow", uri)


def kubeflow(connection: Connection) -> Iterator[Finding]:
    """Whether Kubeflow Pipelines answers."""
    from pipeline.connection import multi_user

    try:
        client: Any = connection.open()
        mode = "multi-user" if multi_user(client) else "standalone"
    except ClusterError as error:
        yield Finding("failure", "Kubeflow Pipelines", str(error), FORWARD)
        return
    yield Finding("ok", "Kubeflow Pipelines", f"{client._existing_config.host}, {mode}")
    if mode == "multi-user" and not connection.namespace:
        yield Finding("failure", "namespace", "Kubeflow separates users, and no namespace is given",
                      "--namespace PROFILE, or GRPO_NAMESPACE")  # fmt: skip

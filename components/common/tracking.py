"""MLflow: one MLflow run a fine-tune, its metrics by iteration, and accepted policies in the model registry.

MLflow holds a projection of what the object store holds, so nothing depends on it: a tracking server that is down, slow
or hangs costs one warning and at most `DEADLINE_SECONDS`. All of MLflow runs in a child process (`mlflow_sync`), which
is ended when the time is over and which keeps MLflow's import (1.4 s of CPU, 0.7 s more to open a database) out of
the stage.

Where: `tracking.uri` of the settings when given; else `MLFLOW_TRACKING_URI`, which Kubeflow Pipelines' MLflow plugin
injects (its `MLFLOW_EXPERIMENT_ID` is used then as well); else the SQLite file `runs/mlflow.db`. The plugin's
`MLFLOW_RUN_ID` is one task's run and ours spans many runs of the pipeline, so it is noted as a tag, not logged to.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from components.common.manifest import Manifest
from components.common.settings import RunContext

log = logging.getLogger("grpo")

DEADLINE_SECONDS = 60.0
"""Longest a stage waits for MLflow, all in all."""
REQUEST_SECONDS = 10
"""Longest one request to a tracking server may take."""
CONNECT_SECONDS = 3.0
"""Longest the first connection may take; a server that is down is found out before MLflow is imported."""
DEFAULT_DATABASE = "sqlite:///runs/mlflow.db"
_CODE = Path(__file__).parents[2]
_QUIET = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Model:
    """An accepted policy for the model registry."""

    name: str
    """Registered model."""
    manifest: Manifest
    """The policy; the registry gets this manifest, the weights stay in the object store."""
    manifest_key: str
    """Where that manifest lies in the store."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of the version: metric, lineage."""
    alias: str = "champion"
    """Alias that moves to this version."""


def tracking_uri(context: RunContext) -> str:
    """The tracking server or database of a run."""
    return context.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_DATABASE


def is_local(context: RunContext) -> bool:
    """The tracking store is a database or folder of this machine, not a server."""
    return urlsplit(tracking_uri(context)).scheme not in ("http", "https")


def metric_name(name: str) -> str:
    """Our metric name as MLflow accepts it: `eval/pass@1` is `eval/pass_at_1` there."""
    return name.replace("@", "_at_")


def sync(
    context: RunContext,
    *,
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    artifacts: Sequence[Path] = (),
    model: Model | None = None,
    finished: bool = False,
    deadline: float = DEADLINE_SECONDS,
) -> dict[str, Any] | None:
    """Brings MLflow up to date with a fine-tune; calling it again changes nothing.

    `records` are those of `history.json`, `settings` the nested settings (params), `artifacts` files that replace those
    of the same name, `finished` marks the MLflow run as ended. Gives the MLflow run's id and, with `model`, the
    version's number; None, after a warning, when MLflow could not be told.
    """
    if not context.tracking.enabled:
        return None
    uri = tracking_uri(context)
    problem = _unreachable(uri)
    if problem is None:
        request = _request(context, uri, records, settings, artifacts, model, finished)
        answer, problem = _run_child(request, deadline)
        if problem is None:
            return answer
    later = "the fine-tune's next evaluation sends its figures, its next publish registers its champion"
    log.warning("MLflow at %s was not told: %s. The run goes on; %s", _safe(uri), problem, later)
    return None


def log_kfp_metrics(output: Any, manifest: Path) -> None:
    """Shows an artifact's metrics in the KFP UI; `output` is a `dsl.Metrics`."""
    for name, value in Manifest.load(manifest).metrics.items():
        output.log_metric(metric_name(name), value)


def _request(
    context: RunContext,
    uri: str,
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    artifacts: Sequence[Path],
    model: Model | None,
    finished: bool,
) -> dict[str, Any]:
    injected = not context.tracking.uri
    tags = {"grpo.fine_tune": context.fine_tune, "grpo.store": context.store, "grpo.last_run": context.run}
    if task_run := os.environ.get("MLFLOW_RUN_ID"):
        tags["grpo.kfp_task_run"] = task_run
    return {
        "uri": uri,
        "experiment": context.tracking.experiment,
        "experiment_id": os.environ.get("MLFLOW_EXPERIMENT_ID") if injected else None,
        "fine_tune": context.fine_tune,
        "run": context.run,
        "tags": tags,
        "params": flatten(settings),
        "records": [
            {"run": record["run"], "iteration": record["iteration"], "created": str(record["created"]),
             "metrics": {metric_name(name): value for name, value in record["metrics"].items()}}
            for record in records
        ],
        "artifacts": [str(Path(path).absolute()) for path in artifacts],
        "finished": finished,
        "model": None if model is None else {
            "name": model.name, "alias": model.alias,
            "digest": model.manifest.digest, "manifest_key": model.manifest_key,
            "manifest": model.manifest.dump().decode(), "tags": dict(model.tags),
        },
    }  # fmt: skip


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow params: dotted name → text; unset ones are left out."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(flatten(value, f"{prefix}{name}."))
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return found


def _unreachable(uri: str) -> str | None:
    """Why a tracking server does not even accept a connection; None: it does, or there is no server."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return None
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:  # refused, unknown host, no answer, not a port
        return f"no connection ({error})"
    return None


def _run_child(request: Mapping[str, Any], deadline: float) -> tuple[dict[str, Any] | None, str | None]:
    """Runs `mlflow_sync`: its answer, or what went wrong."""
    with tempfile.TemporaryDirectory(prefix="grpo-mlflow-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        path = os.pathsep.join(part for part in (str(_CODE), os.environ.get("PYTHONPATH", "")) if part)
        child = subprocess.Popen(
            [sys.executable, "-m", "components.common.mlflow_sync", str(asked), str(answered)],
            env=os.environ | _QUIET | {"PYTHONPATH": path},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            _, complaint = child.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            return None, f"no answer within {deadline:g} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
        if child.returncode != 0 or not answered.exists():
            return None, (complaint.strip().splitlines() or [f"status {child.returncode}"])[-1][:500]
        return json.loads(answered.read_text()), None


def _safe(uri: str) -> str:
    """The address without a password."""
    parts = urlsplit(uri)
    return uri if parts.password is None else uri.replace(f":{parts.password}@", ":…@")

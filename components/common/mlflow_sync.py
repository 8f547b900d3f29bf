"""The child process that talks to MLflow: reads a request of `tracking.sync`, brings MLflow up to date, answers.

Everything here may be repeated: the run is found again by its tag, an iteration is logged once a pipeline run, a param
once, a policy has one version.
"""

import contextlib
import hashlib
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

BATCH_METRICS, BATCH_OTHERS = 1000, 100
"""Most metrics, and most params or tags, that one request of MLflow's REST interface may carry."""
PARAM_CHARACTERS = 500
"""A longer param is cut: databases of older servers hold no more."""
_LOGGED = "grpo.logged."
"""Tag a pipeline run: the last iteration of it that was logged."""


def main(asked: Path, answered: Path) -> None:
    """Does what the request says; any failure ends the process with its message as the last line of stderr."""
    from mlflow.tracking import MlflowClient

    request = json.loads(asked.read_text())
    if request["uri"].startswith("sqlite:///"):
        Path(request["uri"].removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        client = MlflowClient(tracking_uri=request["uri"], registry_uri=request["uri"])
        run = _run(client, request)
        _log_params(client, run, request)
        _log_records(client, run, request)
        for path in request["artifacts"]:
            client.log_artifact(run.info.run_id, path)
        version = _register(client, run, request["model"]) if request["model"] else None
        if request["finished"]:
            client.set_terminated(run.info.run_id, "FINISHED")
    except (
        Exception
    ) as error:  # MLflow, its database and its HTTP layer raise what they like; the parent wants one line
        sys.exit(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    answer = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "model_version": version}
    answered.write_text(json.dumps(answer))


def _run(client: "MlflowClient", request: dict[str, Any]) -> "Run":
    """The fine-tune's one run, made when it is not there."""
    from mlflow.entities import RunTag

    experiment = request["experiment_id"] or _experiment(client, request)
    found = client.search_runs(
        [experiment], filter_string=f"tags.`grpo.fine_tune` = '{request['fine_tune']}'", max_results=1,
        order_by=["attributes.start_time ASC"],
    )  # fmt: skip
    if not found:
        return client.create_run(experiment, run_name=request["fine_tune"], tags=request["tags"])
    run = found[0]
    changed = {name: value for name, value in request["tags"].items() if run.data.tags.get(name) != value}
    if changed:
        client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in changed.items()])
    if run.info.status != "RUNNING" and not request["finished"]:
        client.update_run(run.info.run_id, status="RUNNING")
    return run


def _experiment(client: "MlflowClient", request: dict[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    name = request["experiment"]
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    try:
        return client.create_experiment(name, artifact_location=_artifact_folder(request["uri"]))
    except MlflowException as error:
        experiment = client.get_experiment_by_name(name)  # another process may have made it in between
        if experiment is None:
            raise error
        return experiment.experiment_id


def _artifact_folder(uri: str) -> str | None:
    """Beside the database file, not in whatever directory the process happens to run; a server knows its own."""
    if urlsplit(uri).scheme != "sqlite":
        return None
    return (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()


def _log_params(client: "MlflowClient", run: "Run", request: dict[str, Any]) -> None:
    """New params are logged. MLflow's params never change, so a later run's other value becomes a tag."""
    from mlflow.entities import Param, RunTag

    wanted = {name: value[:PARAM_CHARACTERS] for name, value in request["params"].items()}
    known = run.data.params
    params = [Param(name, value) for name, value in wanted.items() if name not in known]
    tags = [
        RunTag(f"changed.{request['run']}.{name}", value)
        for name, value in wanted.items()
        if name in known and known[name] != value
    ]
    tags = [tag for tag in tags if run.data.tags.get(tag.key) != tag.value]
    for start in range(0, len(params), BATCH_OTHERS):
        client.log_batch(run.info.run_id, params=params[start : start + BATCH_OTHERS])
    for start in range(0, len(tags), BATCH_OTHERS):
        client.log_batch(run.info.run_id, tags=tags[start : start + BATCH_OTHERS])


def _log_records(client: "MlflowClient", run: "Run", request: dict[str, Any]) -> None:
    """Metrics of iterations not logged before, with the time they were made; the tag is set after the metrics."""
    from mlflow.entities import Metric, RunTag

    done = {name.removeprefix(_LOGGED): int(value) for name, value in run.data.tags.items() if name.startswith(_LOGGED)}
    new = [record for record in request["records"] if record["iteration"] > done.get(record["run"], -1)]
    metrics = [
        Metric(name, value, int(datetime.fromisoformat(record["created"]).timestamp() * 1000), record["iteration"])
        for record in new
        for name, value in record["metrics"].items()
    ]
    for start in range(0, len(metrics), BATCH_METRICS):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH_METRICS])
    last = {record["run"]: record["iteration"] for record in sorted(new, key=lambda record: record["iteration"])}
    if last:
        client.log_batch(run.info.run_id, tags=[RunTag(_LOGGED + name, str(value)) for name, value in last.items()])


def _register(client: "MlflowClient", run: "Run", model: dict[str, Any]) -> str:
    """The policy's version in the registry, made when it is not there; the alias points to it."""
    from mlflow.exceptions import MlflowException

    name, tags = model["name"], model["tags"] | {"grpo.digest": model["digest"], "grpo.manifest": model["manifest_key"]}
    with contextlib.suppress(MlflowException):  # it exists; any other trouble shows in the next call
        client.create_registered_model(name, description="Policies accepted by the publish stage.")
    quoted = name.replace("'", "\\'")
    for found in client.search_model_versions(f"name = '{quoted}'"):
        if (
            found.tags.get("grpo.digest") == model["digest"]
            and found.tags.get("grpo.manifest") == model["manifest_key"]
        ):
            version = found.version
            break
    else:
        source = _log_model(client, run, model)
        version = client.create_model_version(name, source, run_id=run.info.run_id, tags=tags).version
    client.set_registered_model_alias(name, model["alias"], version)
    return str(version)


def _log_model(client: "MlflowClient", run: "Run", model: dict[str, Any]) -> str:
    """A model folder of a few KB: MLmodel and the policy's manifest. Loading it fetches the weights from the store."""
    from mlflow.models import Model

    place = f"policies/{hashlib.sha256((model['manifest_key'] + model['digest']).encode()).hexdigest()[:16]}"
    with tempfile.TemporaryDirectory() as folder:
        described = Model(run_id=run.info.run_id, artifact_path=place)
        described.add_flavor(
            "python_function", loader_module="components.publish.loader", data="policy.json",
            python_version=".".join(map(str, sys.version_info[:3])),
        )  # fmt: skip
        described.save(str(Path(folder) / "MLmodel"))
        (Path(folder) / "policy.json").write_text(model["manifest"])
        client.log_artifacts(run.info.run_id, folder, place)
    return f"{run.info.artifact_uri.rstrip('/')}/{place}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

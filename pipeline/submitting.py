"""Sending a run to Kubeflow Pipelines: pipeline, version, experiment, run; and what goes on there."""

import hashlib
import json
import logging
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.common.errors import SettingsError
from pipeline.compiling import compile_to, iterations_that_fit
from pipeline.connection import ClusterError, call, make_once
from pipeline.resources import ClusterSettings, with_form
from pipeline.settings import PipelineSettings

log = logging.getLogger("grpo")
TERMINAL = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
PAGE_SIZE = 100
GO_ON = {"start_from": "latest", "skip_unchanged_data": False}
"""Settings of a run that goes on from another, whose policy may have become champion with this very data set."""
KEPT = ("fine_tune", "model", "store", "start_from", "start_run")
"""Settings that a resumed fine-tune has from its last run."""


@dataclass(frozen=True)
class Uploaded:
    """A pipeline version and the experiment its runs belong to."""

    pipeline_id: str
    version_id: str
    experiment_id: str
    this_run: int
    """Iterations of one run."""
    remaining: int
    """Iterations for the runs after it."""


@dataclass(frozen=True)
class Submitted:
    """A run on the cluster."""

    run_id: str
    name: str
    url: str


def pipeline_name(fine_tune: str) -> str:
    """The pipeline, and the experiment, of a fine-tune."""
    return f"grpo-{fine_tune}"


def check_for_cluster(settings: PipelineSettings) -> None:
    """Refuses what only works on this machine.

    Raises:
        SettingsError: the store is a folder, or model or data are local paths.
    """
    local = [
        f"{name} = {value}"
        for name, value in (
            ("store", settings.store),
            ("model", settings.model),
            ("dataset.source", settings.dataset.source),
            ("dataset.eval_source", settings.dataset.eval_source or ""),
        )
        if value.startswith(("file://", "/"))
    ]
    if local:
        raise SettingsError(
            f"a pod cannot see this machine's files: {', '.join(local)}; put them into object storage, give s3://"
        )


def split(settings: PipelineSettings) -> tuple[PipelineSettings, int]:
    """Settings of the first run of a chain, and the iterations left for the runs after it."""
    this_run = min(settings.iterations, iterations_that_fit(settings))
    return settings.model_copy(update={"iterations": this_run}), settings.iterations - this_run


def upload(client: Any, settings: PipelineSettings) -> Uploaded:
    """Compiles and uploads; the same graph is one version, however often it is submitted.

    Raises:
        ClusterError, SettingsError
    """
    first, remaining = split(settings)
    name = pipeline_name(settings.fine_tune)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compile_to(first, path, remaining=remaining)
        version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        described = f"GRPO fine-tune {settings.fine_tune} of {settings.model}"
        pipeline_id = make_once(
            "upload the pipeline",
            lambda: client.upload_pipeline(str(path), name, described).pipeline_id,
            lambda: call("look up the pipeline", client.get_pipeline_id, name),
        )
        version_id = _version(client, pipeline_id, version, path)
    experiment = call(
        "make the experiment", client.create_experiment, name, namespace=client.get_user_namespace() or None
    )
    return Uploaded(pipeline_id, version_id, experiment.experiment_id, first.iterations, remaining)


def _version(client: Any, pipeline_id: str, name: str, path: Path) -> str:
    made = make_once(
        "upload the version",
        lambda: client.upload_pipeline_version(str(path), name, pipeline_id=pipeline_id),
        lambda: named(client.list_pipeline_versions, "pipeline_versions", name, pipeline_id=pipeline_id),
    )
    return made.pipeline_version_id


def pages(request: Any, attribute: str, **options: Any) -> Iterator[Any]:
    """Every item of a listing, page by page."""
    token = ""
    while True:
        page = call(
            f"list the {attribute.replace('_', ' ')}", request, page_token=token, page_size=PAGE_SIZE, **options
        )
        yield from getattr(page, attribute) or []
        token = page.next_page_token
        if not token:
            return


def named(request: Any, attribute: str, name: str, **options: Any) -> Any:
    """The item of a listing that has this name; None when there is none."""
    return next((found for found in pages(request, attribute, **options) if found.display_name == name), None)


def submit(client: Any, settings: PipelineSettings) -> Submitted:
    """Starts a run of a fine-tune.

    Raises:
        ClusterError: refused, or this fine-tune has a run going on or recurs; the message says which and the way out.
        SettingsError: local paths, or a stage without an image.
    """
    from pipeline.scheduling import check_not_recurring

    check_for_cluster(settings)
    check_at_rest(client, settings.fine_tune)
    check_not_recurring(client, settings.fine_tune)
    name = f"{settings.fine_tune}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    sent = start(client, settings, upload(client, settings), name)
    _check_alone(client, settings.fine_tune, sent)
    return sent


def _check_alone(client: Any, fine_tune: str, sent: Submitted) -> None:
    """Ends a run when another of its fine-tune goes on: who both look and then both start see each other here."""
    try:
        others = [run for run in _going_on(client, fine_tune) if run.run_id != sent.run_id]
    except ClusterError as error:
        log.warning("%s goes on; whether another was submitted at the same moment is not known: %s", sent.name, error)
        return
    if not others:
        return
    met = f"fine-tune {fine_tune}: {others[0].display_name} was submitted at the same moment"
    try:
        call("end the run", client.terminate_run, sent.run_id)
    except ClusterError as error:
        raise ClusterError(f"{met}, both go on; stop this one with `grpo cancel {sent.run_id}` ({error})") from error
    raise ClusterError(f"{met}, so {sent.name} is ended; `grpo status {fine_tune}` tells whether the other goes on")


def check_at_rest(client: Any, fine_tune: str) -> None:
    """Refuses a second run beside one that goes on: both would move the champion.

    Raises:
        ClusterError: a run of this fine-tune goes on; the message names it and the way out.
    """
    if going_on := _going_on(client, fine_tune):
        raise ClusterError(
            f"fine-tune {fine_tune} has run {going_on[0].display_name} going on; wait for it, stop it with "
            f"`grpo cancel {going_on[0].run_id}`, or use another name: --set fine_tune={fine_tune}-2"
        )


def _going_on(client: Any, fine_tune: str) -> list[Any]:
    return [run for run in runs(client, fine_tune) if run.state not in TERMINAL]


def start(client: Any, settings: PipelineSettings, to: Uploaded, name: str) -> Submitted:
    """Starts a run of an uploaded version; one of this name that is there already is taken for it."""
    run = make_once(
        "start the run",
        lambda: client.run_pipeline(
            to.experiment_id, name, params={}, pipeline_id=to.pipeline_id, version_id=to.version_id,
            service_account=settings.cluster.service_account,
        ),
        lambda: named(client.list_runs, "runs", name, experiment_id=to.experiment_id),
    )  # fmt: skip
    return Submitted(run.run_id, name, link(client, run.run_id))


def link(client: Any, run_id: str) -> str:
    """The run's page in the Kubeflow UI."""
    return f"{client._get_url_prefix()}/#/runs/details/{run_id}"


def runs(client: Any, fine_tune: str) -> list[Any]:
    """Runs of a fine-tune, newest first; none when it was never submitted."""
    experiment = call("find the experiment", _experiment, client, pipeline_name(fine_tune))
    if experiment is None:
        return []
    return list(pages(client.list_runs, "runs", experiment_id=experiment.experiment_id, sort_by="created_at desc"))


def _experiment(client: Any, name: str) -> Any:
    try:
        return client.get_experiment(experiment_name=name, namespace=client.get_user_namespace() or None)
    except ValueError:  # the client's own way of saying that there is none
        return None


def settings_of(client: Any, run: Any) -> PipelineSettings:
    """The settings a run was submitted with, out of its pipeline version; with the iterations of its whole chain.

    Raises:
        ClusterError: the run was not made by this product, or its version is gone.
    """
    from components.common.settings import validate
    from components.configure.config import RunSettings
    from components.configure.form import form_fields, overlay

    reference = run.pipeline_version_reference
    version = call(
        "read the pipeline version", client.get_pipeline_version, reference.pipeline_id, reference.pipeline_version_id
    )
    tasks = _tasks(version.pipeline_spec)
    base = json.loads(_constant(tasks, "configure", "settings", run.run_id))
    dotted = {field.name: field.dotted for field in form_fields(RunSettings)}
    given = given_to(run)
    values = overlay(base, {dotted[name]: value for name, value in given.items() if name in dotted}, RunSettings)
    cluster = validate(ClusterSettings, values["cluster"], where=f"run {run.run_id}")
    values["cluster"] = with_form(cluster, given).model_dump()
    if "submit-next" in tasks:
        values["iterations"] += int(_constant(tasks, "submit-next", "remaining", run.run_id))
    return validate(PipelineSettings, values, where=f"run {run.run_id}")


def name_in_store(run: Any) -> str:
    """What configure calls a run: the form's `run`, or its id."""
    return (given_to(run).get("run") or run.run_id).lower()


def given_to(run: Any) -> dict[str, Any]:
    """Values of the form that a run was started with."""
    return (run.runtime_config.parameters if run.runtime_config else None) or {}


def _tasks(spec: dict[str, Any]) -> dict[str, Any]:
    """Tasks of the graph and of the conditions and loops in it, by their keys."""
    ir = spec.get("pipeline_spec", spec)
    graphs = [component.get("dag", {}) for component in [*ir.get("components", {}).values(), ir.get("root", {})]]
    return {key: task for graph in graphs for key, task in graph.get("tasks", {}).items()}


def _constant(tasks: dict[str, Any], task: str, name: str, run_id: str) -> Any:
    try:
        return tasks[task]["inputs"]["parameters"][name]["runtimeValue"]["constant"]
    except (KeyError, TypeError):
        raise ClusterError(f"run {run_id} was not submitted by grpo: its pipeline has no settings") from None


def resumed(
    client: Any, fine_tune: str, store_endpoint: str | None = None, overrides: Sequence[str] = ()
) -> PipelineSettings:
    """Settings that go on with a fine-tune from its last checkpoint, for the iterations that remain.

    `overrides` are laid over them, as `section.name=value`; `iterations` counts from the checkpoint.

    Raises:
        ClusterError: it was never submitted.
        SettingsError: nothing remains, or an override is wrong or of what a fine-tune keeps.
    """
    from components.common.settings import apply_overrides, validate

    found = runs(client, fine_tune)
    if not found:
        raise ClusterError(f"fine-tune {fine_tune} has no run to go on with; `grpo submit FILE` starts one")
    settings = settings_of(client, found[0])
    run = name_in_store(found[0])
    done = _updates(client, found[0], settings, store_endpoint)
    start = {} if done is None else GO_ON | {"start_run": run}
    before = settings.model_dump(mode="json") | start | {"iterations": settings.iterations - (done or 0)}
    values = apply_overrides(before, overrides)
    changed = [name for name in KEPT if values[name] != before[name]]
    if changed:
        raise SettingsError(f"--resume keeps {', '.join(changed)}: submit a settings file for another start")
    if values["iterations"] == before["iterations"] < 1:
        raise SettingsError(
            f"fine-tune {fine_tune} has had its {settings.iterations} iterations. If its last run failed after them, "
            f"*Retry* finishes it ({link(client, found[0].run_id)}); --set iterations=N adds N more"
        )
    again = validate(PipelineSettings, values, where=f"resumed {fine_tune}")
    return again.model_copy(update={"reward": again.reward.embedded(Path.cwd())})


def _updates(client: Any, run: Any, settings: PipelineSettings, store_endpoint: str | None) -> int | None:
    """Updates that a run has done, by its policies, or by its tasks where the store cannot be read from here; None: it
    never began."""
    from components.common.errors import StoreError
    from components.configure.start import policy_iterations
    from pipeline.following import tasks_of
    from pipeline.reaching import open_from_here

    try:
        policies = policy_iterations(
            open_from_here(settings.store, store_endpoint), settings.fine_tune, name_in_store(run)
        )
    except StoreError:
        tasks = tasks_of(call("read the run", client.get_run, run.run_id))
        ended = [task.stage for task in tasks if task.state == "SUCCEEDED"]
        return ended.count("update") if "configure" in ended else None
    return max(policies) - min(policies) if policies else None

"""The `grpo` commands that speak to a cluster: submit, status, logs, cancel, schedule."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.options import Overrides, SettingsFile

app = typer.Typer()

Host = Annotated[
    str | None,
    typer.Option(envvar="GRPO_HOST", help="Kubeflow Pipelines' address; unset: in-cluster, or through the kubeconfig."),
]
Namespace = Annotated[
    str | None,
    typer.Option(envvar="GRPO_NAMESPACE", help="Namespace of the runs; unset: the kubeconfig's or kubeflow."),
]
Token = Annotated[str | None, typer.Option(envvar="GRPO_TOKEN", help="Bearer token.")]
Cookie = Annotated[str | None, typer.Option(envvar="GRPO_COOKIE", help="Dex session: authservice_session=…")]
CaCert = Annotated[str | None, typer.Option(envvar="GRPO_CA_CERT", help="File of the certificate authority.")]
RunId = Annotated[str, typer.Argument(help="Id of the run, as `grpo status` shows it.", metavar="RUN")]
FineTune = Annotated[str, typer.Argument(help="Name of the fine-tune.", metavar="FINE_TUNE")]


def _client(
    host: str | None, namespace: str | None, token: str | None, cookie: str | None, ca_cert: str | None
) -> Any:  # fmt: skip
    from pipeline.connection import Connection

    return Connection(host, namespace, token, cookie, ca_cert).open()


@app.command()
def submit(
    file: Annotated[Path | None, typer.Argument(help="Settings file (TOML).", metavar="[FILE]")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on with this fine-tune from its last checkpoint.", metavar="NAME")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    cookie: Cookie = None,
    ca_cert: CaCert = None,
) -> None:
    """Run the pipeline on a cluster."""
    from components.common.errors import SettingsError
    from pipeline.settings import load
    from pipeline.submitting import resumed, split
    from pipeline.submitting import submit as send

    if (file is None) == (resume is None):
        raise SettingsError("give a settings file, or --resume with the name of a fine-tune")
    client = _client(host, namespace, token, cookie, ca_cert)
    settings = resumed(client, resume) if file is None else load(file, overrides or [])
    first, remaining = split(settings)
    sent = send(client, settings)
    print(f"{sent.name}: {first.iterations} iterations" + (f", {remaining} in runs after it" if remaining else ""))
    print(sent.url)
    if wait:
        _follow(client, sent.run_id, namespace)


def _follow(client: Any, run_id: str, namespace: str | None) -> None:
    from rich.console import Console

    from components.common.errors import StageError
    from pipeline.following import Pods, follow

    console = Console(highlight=False)
    shown: dict[str, str] = {}
    state = ""
    for run, tasks in follow(client, run_id):
        state = run.state
        for task in tasks:
            if shown.get(task.name) != task.state:
                shown[task.name] = task.state
                console.print(f"{task.name:<16} {task.state.lower()}")
    failed = [name for name, state in shown.items() if state == "FAILED"]
    if failed:
        for line in Pods.connect(namespace).log(run_id, failed[-1].split()[0], tail=40):
            console.print(line, markup=False)
    if state != "SUCCEEDED":
        raise StageError(f"run {run_id} ended as {state.lower()}" + (f" in {failed[-1]}" if failed else ""))


@app.command()
def status(
    fine_tune: FineTune,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    cookie: Cookie = None,
    ca_cert: CaCert = None,
) -> None:
    """Show a fine-tune's runs, and the tasks of the newest."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.connection import call
    from pipeline.following import tasks_of
    from pipeline.submitting import runs

    client = _client(host, namespace, token, cookie, ca_cert)
    found = runs(client, fine_tune)
    console = Console(highlight=False)
    if not found:
        console.print(f"fine-tune {fine_tune} has no runs")
        return
    table = Table(box=None, header_style="dim")
    for heading in ("run", "name", "state", "began"):
        table.add_column(heading)
    for run in found:
        table.add_row(run.run_id, run.display_name, (run.state or "").lower(), str(run.created_at))
    console.print(table)
    for task in tasks_of(call("read the run", client.get_run, found[0].run_id)):
        console.print(f"  {task.name:<16} {task.state.lower()} {task.error}")


@app.command()
def logs(
    run: RunId,
    stage: Annotated[str, typer.Argument(help="Stage, e.g. update.")],
    tail: Annotated[int | None, typer.Option(help="Only the last lines.")] = None,
    namespace: Namespace = None,
) -> None:
    """Print the log of a stage's newest pod."""
    from pipeline.following import Pods

    for line in Pods.connect(namespace).log(run, stage, tail=tail):
        print(line)


@app.command()
def cancel(
    run: RunId,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    cookie: Cookie = None,
    ca_cert: CaCert = None,
) -> None:
    """End a run and everything it started."""
    from pipeline.following import Pods
    from pipeline.following import cancel as end

    jobs = end(_client(host, namespace, token, cookie, ca_cert), Pods.connect(namespace), run)
    print(f"run {run} is ended" + (f", and TrainJobs {', '.join(jobs)}" if jobs else ""))


@app.command()
def schedule(
    file: SettingsFile,
    cron: Annotated[str, typer.Option(help='Minute, hour, day, month, weekday: "0 3 * * *".')],
    timezone: Annotated[str | None, typer.Option(help="Zone of the hour, e.g. Europe/Berlin; unset: UTC.")] = None,
    overrides: Overrides = None,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    cookie: Cookie = None,
    ca_cert: CaCert = None,
) -> None:
    """Make a fine-tune recur: one at a time, each from the champion and the newest data."""
    from pipeline.scheduling import schedule as make
    from pipeline.settings import load

    made = make(_client(host, namespace, token, cookie, ca_cert), load(file, overrides or []), cron, timezone)
    print(f"{made.name} recurs at {made.cron} (UTC, seconds first)")


@app.command()
def schedules(
    host: Host = None, namespace: Namespace = None, token: Token = None, cookie: Cookie = None, ca_cert: CaCert = None
) -> None:
    """List the recurring fine-tunes."""
    from pipeline.scheduling import schedules as listed

    for found in listed(_client(host, namespace, token, cookie, ca_cert)):
        print(f"{found.name.removeprefix('grpo-'):<32} {found.cron:<20} {'enabled' if found.enabled else 'disabled'}")


@app.command()
def unschedule(
    fine_tune: FineTune,
    host: Host = None,
    namespace: Namespace = None,
    token: Token = None,
    cookie: Cookie = None,
    ca_cert: CaCert = None,
) -> None:
    """End a fine-tune's schedule."""
    from pipeline.scheduling import unschedule as end

    for found in end(_client(host, namespace, token, cookie, ca_cert), fine_tune):
        print(f"{fine_tune} no longer recurs ({found.cron})")

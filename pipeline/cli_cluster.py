"""The `grpo` commands that speak to a cluster: submit, status, logs, cancel, schedule."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.connection import Connection
from pipeline.options import Overrides, SettingsFile, connected

app = typer.Typer()

RunId = Annotated[str, typer.Argument(help="Id of the run, as `grpo status` shows it.", metavar="RUN")]
FineTune = Annotated[str, typer.Argument(help="Name of the fine-tune.", metavar="FINE_TUNE")]


@app.command()
@connected
def submit(
    file: Annotated[Path | None, typer.Argument(help="Settings file (TOML).", metavar="[FILE]")] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on with this fine-tune from its last checkpoint.", metavar="NAME")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    *,
    connection: Connection,
) -> None:
    """Run the pipeline on a cluster."""
    from components.common.errors import SettingsError
    from pipeline.settings import load
    from pipeline.submitting import resumed, split
    from pipeline.submitting import submit as send

    if (file is None) == (resume is None):
        raise SettingsError("give a settings file, or --resume with the name of a fine-tune")
    client = connection.open()
    if file is None:
        settings = resumed(client, resume, connection.store_endpoint, overrides or [])
    else:
        settings = load(file, overrides or [])
    first, remaining = split(settings)
    sent = send(client, settings)
    print(f"{sent.name}: {first.iterations} iterations" + (f", {remaining} in runs after it" if remaining else ""))
    print(sent.url)
    if wait:
        _wait(client, first, sent.run_id, connection)


def _wait(client: Any, settings: Any, run_id: str, connection: Connection) -> None:
    from rich.console import Console

    from pipeline.reaching import OutOfReach, open_from_here
    from pipeline.waiting import watch

    console, store = Console(highlight=False), None
    try:
        store = open_from_here(settings.store, connection.store_endpoint)
    except OutOfReach as error:
        console.print(f"(iterations are shown without their metrics: {error})", markup=False, soft_wrap=True)
    context = settings.context(run=run_id, first_iteration=0)  # tasks are numbered as in Kubeflow's graph
    watch(client, run_id, context, console, namespace=connection.namespace, store=store)


@app.command()
@connected
def status(
    fine_tune: FineTune,
    *,
    connection: Connection,
) -> None:
    """Show a fine-tune's runs, and the tasks of the newest."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.connection import call
    from pipeline.following import tasks_of
    from pipeline.submitting import TERMINAL, runs
    from pipeline.waiting import PodNews

    client = connection.open()
    found = runs(client, fine_tune)
    console = Console(highlight=False)
    if not found:
        console.print(f"fine-tune {fine_tune} has no runs")
        return
    table = Table(box=None, header_style="dim")
    table.add_column("run", min_width=36)  # whole: it is what the other commands want
    for heading in ("state", "began", "name"):
        table.add_column(heading, no_wrap=True)
    for run in found:
        table.add_row(run.run_id, (run.state or "").lower(), f"{run.created_at:%Y-%m-%d %H:%M}", run.display_name)
    console.print(table)
    for task in tasks_of(call("read the run", client.get_run, found[0].run_id)):
        console.print(f"  {task.name:<16} {task.state.lower()} {task.error}")
    if found[0].state not in TERMINAL:
        for line in PodNews(connection.namespace).lines(found[0].run_id):
            console.print(f"  {line}", markup=False, soft_wrap=True)


@app.command()
@connected
def logs(
    run: RunId,
    stage: Annotated[str, typer.Argument(help="Stage, e.g. update.")],
    tail: Annotated[int | None, typer.Option(help="Only the last lines.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Whole, and what comes until the pod ends.")] = False,
    *,
    connection: Connection,
) -> None:
    """Print the log of a stage's newest pod."""
    from components.common.errors import SettingsError
    from pipeline.following import Pods

    if follow and tail:
        raise SettingsError("give --tail or --follow: what is followed is shown whole")
    pods = Pods.connect(connection.namespace)
    for line in pods.log_as_it_grows(run, stage) if follow else pods.log(run, stage, tail=tail):
        print(line, flush=True)


@app.command()
@connected
def cancel(
    run: RunId,
    *,
    connection: Connection,
) -> None:
    """End a run and everything it started."""
    from pipeline.connection import ClusterError
    from pipeline.following import Pods
    from pipeline.following import cancel as end

    end(connection.open(), run)
    print(f"run {run} is ended")
    try:
        jobs = Pods.connect(connection.namespace).delete_train_jobs(run)
    except ClusterError as error:
        print(
            f"warning: a TrainJob of it may go on until the janitor comes, every 15 minutes: {error}", file=sys.stderr
        )
        return
    if jobs:
        print(f"deleted: TrainJobs {', '.join(jobs)}")


@app.command()
@connected
def schedule(
    file: SettingsFile,
    cron: Annotated[str, typer.Option(help='Minute, hour, day, month, weekday: "0 3 * * *".')],
    timezone: Annotated[str | None, typer.Option(help="Zone of the hour, e.g. Europe/Berlin; unset: UTC.")] = None,
    overrides: Overrides = None,
    *,
    connection: Connection,
) -> None:
    """Make a fine-tune recur: one at a time, each from the champion and the newest data."""
    from pipeline.scheduling import schedule as make
    from pipeline.settings import load

    made = make(connection.open(), load(file, overrides or []), cron, timezone)
    print(f"{made.name} recurs at {made.cron} (UTC, seconds first)")


@app.command()
@connected
def schedules(*, connection: Connection) -> None:
    """List the recurring fine-tunes."""
    from pipeline.scheduling import schedules as listed

    for found in listed(connection.open()):
        print(f"{found.name.removeprefix('grpo-'):<32} {found.cron:<20} {'enabled' if found.enabled else 'disabled'}")


@app.command()
@connected
def unschedule(
    fine_tune: FineTune,
    *,
    connection: Connection,
) -> None:
    """End a fine-tune's schedule."""
    from pipeline.scheduling import unschedule as end

    for found in end(connection.open(), fine_tune):
        print(f"{fine_tune} no longer recurs ({found.cron})")

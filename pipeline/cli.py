"""The `grpo` command. Heavy imports wait until a command needs them, so `--help` answers at once."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.common.errors import ArtifactNotFound, GrpoError, StageError
from pipeline import cli_artifacts, cli_checks, cli_cluster
from pipeline.options import Overrides, SettingsFile

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.runs import RunDir

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models with GRPO: on this machine, or on Kubernetes through Kubeflow Pipelines.",
)

Run = Annotated[
    str | None, typer.Argument(help="`fine-tune/run-0001`, a fine-tune (its newest run), or nothing (the newest).")
]


@app.command()
def run(
    file: SettingsFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run of this fine-tune; finished stages are kept.")
    ] = False,
) -> None:
    """Run the pipeline on this machine, every stage a process."""
    from rich.console import Console

    from components.common.events import read_events
    from components.common.store import open_store
    from pipeline.live import Watcher
    from pipeline.local import run_here
    from pipeline.runs import find_run, new_run
    from pipeline.settings import load

    settings = load(file, overrides or [])
    here = find_run(settings.fine_tune) if resume else new_run(settings.fine_tune, open_store(settings.store))
    if resume and here.state == "done":
        raise GrpoError(f"{here.fine_tune}/{here.name} is done; start the next run without --resume")
    console = Console(highlight=False)
    title = f"{here.fine_tune}/{here.name}"
    begun = f"[bold]{title}[/]  {settings.iterations} iterations from {settings.model}; logs in {here.path}/logs"
    console.print(begun, soft_wrap=True)
    watcher = Watcher(console, title, iterations=settings.iterations, earlier=len(read_events(here.path)))
    chosen = [word for override in overrides or [] for word in ("--set", override)]
    again = shlex.join(["grpo", "run", str(file), *chosen, "--resume"])
    try:
        with watcher as watch:
            run_here(here, settings, watch)
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    except StageError as error:
        hint = f"\nwhen that is mended, go on with: {again}" if here.state == "failed" else ""
        raise StageError(f"{error}{hint}") from None
    _summarise(here, console)


def _summarise(run: "RunDir", console: "Console") -> None:
    from components.common.events import read_events
    from pipeline.progress import iteration_records, iteration_table
    from pipeline.reports import export_report, verdict

    try:
        report = export_report(run.path)
    except ArtifactNotFound:
        console.print("nothing was trained: the data set has not changed since the champion was accepted")
        return
    console.print(iteration_table(iteration_records(read_events(run.path))))
    for line in (*report.sentences, verdict(run)):
        console.print(line, soft_wrap=not console.is_terminal)
    console.print(f"report: {report.path}", soft_wrap=True)


@app.command(name="compile")
def compile_pipeline(
    file: SettingsFile,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("pipeline.yaml"),
    overrides: Overrides = None,
) -> None:
    """Compile the pipeline to a file that the Kubeflow UI takes."""
    from components.common.errors import SettingsError
    from pipeline.compiling import compile_to
    from pipeline.settings import load
    from pipeline.submitting import check_for_cluster

    settings = load(file, overrides or [])
    try:
        check_for_cluster(settings)
    except SettingsError as error:  # the form may still name others
        print(f"warning: {error}", file=sys.stderr)
    tasks = compile_to(settings, output)
    print(f"{output}: {tasks} tasks, {settings.iterations} iterations")


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="Folder to make.", metavar="DIR")]) -> None:
    """Write a commented settings file and a reward function to start from."""
    from pipeline.scaffold import write_start

    for path in write_start(folder):
        print(path)
    print(f"next: grpo run {folder / 'settings.toml'}")


@app.command()
def show(run: Run = None) -> None:
    """Show a local run's iterations with their metrics."""
    from rich.console import Console

    from components.common.events import read_events
    from pipeline.progress import iteration_records, iteration_table
    from pipeline.reports import verdict
    from pipeline.runs import find_run

    found = find_run(run)
    console = Console(highlight=False)
    console.print(f"[bold]{found.fine_tune}/{found.name}[/]  {found.state}")
    console.print(iteration_table(iteration_records(read_events(found.path))))
    if found.state == "done":
        console.print(verdict(found), soft_wrap=not console.is_terminal)


@app.command()
def report(run: Run = None) -> None:
    """Print the path of a local run's HTML report."""
    from pipeline.reports import export_report
    from pipeline.runs import find_run

    print(export_report(find_run(run).path).path)


app.registered_commands += cli_cluster.app.registered_commands
app.registered_commands += cli_checks.app.registered_commands
app.add_typer(cli_artifacts.app, name="artifacts")


def main() -> None:
    """Entry point: a user's error is a message and status 1, never a traceback."""
    try:
        app()
    except GrpoError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False).print("[red]error:[/] ", end="")
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

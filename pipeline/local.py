"""Runs a pipeline on this machine through Kubeflow Pipelines' own local runner.

The runner lives in a child process whose output goes to the run's `logs/pipeline.log`; the parent watches the run's
events. Every task is a process of its own, as it is a pod of its own on the cluster.
"""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.common.errors import StageError
from components.common.events import RUN_DIR_VARIABLE, read_events
from components.common.settings import validate
from pipeline.runs import RunDir, locked
from pipeline.settings import PipelineSettings

POLL_SECONDS = 0.2
GRACE_SECONDS = 15.0
"""What a stage gets to finish or drop its work before it is killed."""


def run_here(run: RunDir, settings: PipelineSettings, watch: Callable[[list[dict[str, Any]]], None]) -> None:
    """Runs a pipeline to its end; `watch` gets all events so far, a few times a second.

    Raises:
        StageError: a stage failed, or another run of this fine-tune goes on.
        KeyboardInterrupt: stopped by the user; the children are gone by then and the run can be resumed.
    """
    if settings.update.nodes > 1:
        raise StageError(f"update.nodes = {settings.update.nodes} needs a cluster; here: --set update.nodes=1")
    with locked(settings.fine_tune) as lock:
        run.begin(settings.model_dump_json(indent=1))
        earlier = len(read_events(run.path))
        with _interruptible(), _child(run, lock) as child:
            try:
                while child.poll() is None:
                    watch(read_events(run.path))
                    time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                _stop(child)
                run.end("interrupted")
                raise
        events = read_events(run.path)
        watch(events)
        run.end("done" if child.returncode == 0 else "failed")
        if child.returncode != 0:
            raise StageError(_reason(run, events[earlier:]))


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _child(run: RunDir, lock: int) -> Iterator[subprocess.Popen[bytes]]:
    """The process that drives the tasks, in a session of its own so that Ctrl-C reaches it through us alone."""
    environment = os.environ | {RUN_DIR_VARIABLE: str(run.path.resolve())}
    with run.pipeline_log.open("ab") as log:
        command = [sys.executable, "-m", "pipeline.local", str(run.path)]
        child = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, pass_fds=[lock], start_new_session=True
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends a process and everything it started, gently first."""
    import psutil

    try:
        family = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    child.kill()  # the runner first: it must not start the next task
    for process in family:
        with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()


def _reason(run: RunDir, events: list[dict[str, Any]]) -> str:
    failures = [event for event in events if event["event"] == "failed"]
    if failures:
        last = failures[-1]
        return f"{last['task']} failed: {last['error']}\n  its log: {last['log']}"
    open_tasks = [event["task"] for event in events if event["event"] == "start"]
    ended = {event["task"] for event in events if event["event"] != "start"}
    killed = [task for task in open_tasks if task not in ended]
    if killed:
        return f"{killed[-1]} was killed\n  its log: {run.path / 'logs' / killed[-1]}.log"
    errors = re.findall(
        r"^\s*([\w.]*(?:Error|Exception): .+)$", run.pipeline_log.read_text(errors="replace"), re.MULTILINE
    )
    told = [line for line in errors if "Inner task failed" not in line] or errors or ["for a reason it did not tell"]
    return f"the pipeline could not run: {told[-1]}\n  its log: {run.pipeline_log}"


def drive(run: RunDir) -> None:
    """Drives the tasks, in the child process; raises when one fails."""
    from kfp import local

    from pipeline.graph import build

    warnings.filterwarnings("ignore", message="You may be attemp")  # our images hold this very environment
    settings = validate(PipelineSettings, run.settings(), where=str(run.settings_path))
    root = run.path.resolve() / "kfp"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
    build(settings, on_cluster=False)(run=run.name)


if __name__ == "__main__":
    drive(RunDir(Path(sys.argv[1])))

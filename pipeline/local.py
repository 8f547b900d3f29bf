"""Runs a pipeline on this machine through Kubeflow Pipelines' own local runner.

The runner lives in a child process, the driver, whose output goes to the run's `logs/pipeline.log`; the parent watches
the run's events. Every task is a process of its own, as it is a pod of its own on the cluster. The driver is in a
session of its own and writes itself how the run ended: it outlives a closed terminal and a killed parent.
"""

import os
import re
import shutil
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
from components.common.events import RUN_DIR_VARIABLE, open_tasks, read_events
from components.common.settings import validate
from pipeline.runs import RunDir, locked
from pipeline.settings import PipelineSettings

POLL_SECONDS = 0.2
GRACE_SECONDS = 15.0
"""What a stage gets to finish or drop its work before it is killed."""
INTERRUPTED = 130
"""Exit status of a driver that was told to end."""


def run_here(run: RunDir, settings: PipelineSettings, watch: Callable[[list[dict[str, Any]]], None]) -> None:
    """Runs a pipeline to its end; `watch` gets all events so far, a few times a second.

    Raises:
        StageError: a stage failed, or another run of this fine-tune goes on.
        KeyboardInterrupt: stopped by the user; the children are gone by then and the run can be resumed.
    """
    if settings.update.nodes > 1:
        raise StageError(f"update.nodes = {settings.update.nodes} needs a cluster; here: --set update.nodes=1")
    with locked(settings.fine_tune) as lock:
        run.begin(settings)
        earlier, logged = len(read_events(run.path)), _size(run.pipeline_log)
        driver = _start(run, lock)
        with _interruptible(driver):
            try:
                while driver.poll() is None:
                    watch(read_events(run.path))
                    time.sleep(POLL_SECONDS)
            finally:
                _stop(driver)
                if run.state == "interrupted":  # it may have been killed before it could say so
                    run.end("interrupted")
        events = read_events(run.path)
        watch(events)
        if driver.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        if driver.returncode != 0:
            run.end("failed")
            raise StageError(_reason(run, events[earlier:], logged))


def _start(run: RunDir, lock: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {RUN_DIR_VARIABLE: str(run.path.resolve())}
    command = [sys.executable, "-m", "pipeline.local", str(run.path)]
    with run.pipeline_log.open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, pass_fds=[lock], start_new_session=True
        )


@contextmanager
def _interruptible(driver: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; coming again, they kill what is still there."""
    told = []

    def interrupt(*_: object) -> None:
        if told:
            _kill(driver)
            return
        told.append(True)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(driver: subprocess.Popen[bytes]) -> None:
    """Lets the driver end its tasks, and kills what is left then, or what a killed driver left."""
    if driver.poll() is None:
        driver.terminate()
        with suppress(subprocess.TimeoutExpired):
            driver.wait(2 * GRACE_SECONDS)
    if driver.returncode is None or driver.returncode < 0:
        _kill(driver)
        driver.wait()


def _kill(driver: subprocess.Popen[bytes]) -> None:
    import psutil

    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(driver.pid).children(recursive=True)
    with suppress(ProcessLookupError):  # its group, which has the tasks of a driver that is gone
        os.killpg(driver.pid, signal.SIGKILL)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(run: RunDir, events: list[dict[str, Any]], logged: int) -> str:
    """Why the run failed; `logged` is where its part of the pipeline's log begins."""
    failures = [event for event in events if event["event"] == "failed"]
    if failures:
        last = failures[-1]
        return f"{last['task']} failed: {last['error']}\n  its log: {last['log']}"
    killed = list(open_tasks(events))
    if killed:
        return f"{killed[-1]} was killed\n  its log: {run.path / 'logs' / killed[-1]}.log"
    log = run.pipeline_log.read_bytes()[logged:].decode(errors="replace")
    return f"{_outside_a_stage(log)}\n  its log: {run.pipeline_log}"


def _outside_a_stage(log: str) -> str:
    """What the log of a pipeline says of an error before or after the stage itself: the last one of ours, or any."""
    task = re.findall(r"Inner task failed: \S*?'([\w-]+)'", log)
    who = f"{task[-1]} failed" if task else "the pipeline could not run"
    ours = re.findall(r"^ *components\.common\.errors\.\w+: (.+(?:\n *\S.*)*)", log, re.MULTILINE)
    if ours:
        return f"{who}: " + ours[-1].replace("\n    ", "\n")  # the runner indents what tasks print
    errors = re.findall(r"^\s*([\w.]*(?:Error|Exception): .+)$", log, re.MULTILINE)
    told = [line for line in errors if "Inner task failed" not in line] or ["for a reason it did not tell"]
    return f"{who}: {told[-1]}"


# --- the driver, in the child process --------------------------------------------------------------------------------


def drive(run: RunDir) -> None:
    """Drives the tasks and says how the run ended; raises when one fails."""
    run.running(os.getpid())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _end(run))
    _tidy(run)
    try:
        _drive(run)
    except BaseException:
        _tidy(run)
        run.end("failed")
        raise
    run.end("done")


def _drive(run: RunDir) -> None:
    from kfp import local

    from pipeline.graph import build

    warnings.filterwarnings("ignore", message="You may be attemp")  # our images hold this very environment
    settings = validate(PipelineSettings, run.settings(), where=str(run.settings_path))
    root = run.path.resolve() / "kfp"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
    build(settings, on_cluster=False)(run=run.name)


def _end(run: RunDir) -> None:
    """Ends all tasks, gently first, and the driver; nothing can start a further stage, since this thread would."""
    import psutil

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while family := psutil.Process().children(recursive=True):
        for process in family:
            with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(POLL_SECONDS)  # the threads that run shards may just have started another
    _tidy(run)
    run.end("interrupted")
    os._exit(INTERRUPTED)


def _tidy(run: RunDir) -> None:
    """Removes the work directories of stages that were killed."""
    for task, event in open_tasks(read_events(run.path)).items():
        folder = Path(event.get("work_dir", ""))  # older code did not tell it
        if folder.name.startswith(f"grpo-{task}-"):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    drive(RunDir(Path(sys.argv[1])))

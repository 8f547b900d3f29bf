"""Run directories of local runs: `runs/<fine-tune>/<run>/`.

settings.json   the settings the run was started with
events.jsonl    what its stages told (components.common.events)
logs/           one file a task, and pipeline.log
kfp/            what Kubeflow Pipelines keeps of the tasks
state.json      how it ended: done, failed or interrupted; or that it is running, and the process that drives it
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.errors import SettingsError, StageError
from components.common.events import read_events
from components.common.store import Store, write_whole
from components.configure.config import RunSettings

ROOT = Path("runs")
RESERVED = ("store", "mlflow.db", "mlartifacts")
"""What lies beside the fine-tunes by default."""
RUN_NAME = re.compile(r"run-\d{4,}")
WHOLE_RUN = ("fine_tune", "model", "store", "seed", "start_from", "start_run", "iterations", "shards", "staleness")
"""Settings that a run keeps when it is resumed."""


@dataclass(frozen=True)
class RunDir:
    """One run's directory."""

    path: Path

    @property
    def fine_tune(self) -> str:
        """Name of the fine-tune."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def settings_path(self) -> Path:
        """The settings the run was started with."""
        return self.path / "settings.json"

    @property
    def pipeline_log(self) -> Path:
        """Log of Kubeflow Pipelines' local runner."""
        return self.path / "logs" / "pipeline.log"

    @property
    def state(self) -> str:
        """`running`, `done`, `failed` or `interrupted`, which it is too when the process that drove it is gone."""
        try:
            told = json.loads((self.path / "state.json").read_text())
        except FileNotFoundError:
            return "interrupted"
        if told["state"] != "running":
            return told["state"]
        started = _started(told["process"])
        return "running" if started is not None and started == told["process_started"] else "interrupted"

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return json.loads(self.settings_path.read_text())

    def begin(self, settings: RunSettings) -> None:
        """Makes the directory, or reopens it.

        Raises:
            SettingsError: the run has results that other values of the whole run could not go on from.
        """
        self._check_same_run(settings)
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        write_whole(self.settings_path, settings.model_dump_json(indent=1).encode())

    def _check_same_run(self, settings: RunSettings) -> None:
        """What a stage is told may be mended; what the run starts from and how long it is may not."""
        if not any(event["event"] == "done" for event in read_events(self.path)):
            return
        before, now = self.settings(), settings.model_dump(mode="json")
        # A run begun by older code may lack a setting.
        changed = [name for name in WHOLE_RUN if before.get(name) != now[name]]
        if changed:
            told = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
            raise SettingsError(f"{self.fine_tune}/{self.name}: {told}: that is another run, start it without --resume")

    def running(self, process: int) -> None:
        """Says which process drives the run."""
        told = {"state": "running", "process": process, "process_started": _started(process)}
        self._tell(told)

    def end(self, state: str) -> None:
        """Says how the run ended."""
        self._tell({"state": state})

    def _tell(self, told: dict[str, Any]) -> None:
        write_whole(self.path / "state.json", (json.dumps(told) + "\n").encode())


def _started(process: int) -> float | None:
    """When a process started; none: it is gone. Numbers are given to other processes again."""
    import psutil

    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.NoSuchProcess:
        return None


def new_run(fine_tune: str, store: Store) -> RunDir:
    """Directory of the next run of a fine-tune: its number follows those that are here and those in the store.

    Raises:
        SettingsError: the name is that of something else below `runs`.
    """
    if fine_tune in RESERVED:
        raise SettingsError(f"fine_tune = {fine_tune!r}: {ROOT / fine_tune} is not for runs; choose another name")
    stored = {stat.key.split("/")[2] for stat in store.list(f"manifests/{fine_tune}/")}
    here = {run.name for run in runs_of(ROOT / fine_tune)}
    numbers = [int(name[4:]) for name in stored | here if RUN_NAME.fullmatch(name)]
    return RunDir(ROOT / fine_tune / f"run-{max(numbers, default=0) + 1:04d}")


def runs_of(folder: Path) -> list[RunDir]:
    """Runs of a fine-tune, oldest first."""
    if not folder.is_dir():
        return []
    return [RunDir(path) for path in sorted(folder.iterdir()) if RUN_NAME.fullmatch(path.name)]


def find_run(text: str | None) -> RunDir:
    """The run a user means: `fine-tune/run-0002`, `fine-tune` (its newest), a path, or nothing (the newest of all).

    Raises:
        SettingsError: no such run; the message names those there are.
    """
    candidates = [Path(text), ROOT / text] if text else []
    for path in candidates:
        if (path / "settings.json").exists():
            return RunDir(path.resolve())
    folders = [ROOT / text] if text else sorted(ROOT.glob("*"))
    runs = [run for folder in folders for run in runs_of(folder)]
    if not runs:
        known = ", ".join(f"{run.fine_tune}/{run.name}" for folder in sorted(ROOT.glob("*")) for run in runs_of(folder))
        raise SettingsError(f"no run {text or 'yet'} under {ROOT.resolve()}; there is: {known or 'nothing'}")
    return max(runs, key=lambda run: run.settings_path.stat().st_mtime)


@contextmanager
def locked(fine_tune: str) -> Iterator[int]:
    """Holds a fine-tune for one run at a time; gives the lock's file descriptor, for the process that drives the run.

    Raises:
        StageError: another run of this fine-tune goes on.
    """
    path = ROOT / fine_tune / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StageError(_taken(fine_tune)) from None
    else:
        yield lock
    finally:
        os.close(lock)


def _taken(fine_tune: str) -> str:
    going_on = [run for run in runs_of(ROOT / fine_tune) if run.state == "running"]
    told = [json.loads((run.path / "state.json").read_text()) for run in going_on]
    stop = "".join(f", stop it with `kill {one['process']}`" for one in told if "process" in one)
    return (
        f"fine-tune {fine_tune} has a run going on; wait for it{stop}, or start this one under another name: "
        f"--set fine_tune={fine_tune}-2"
    )

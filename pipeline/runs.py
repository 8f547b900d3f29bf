"""Run directories of local runs: `runs/<fine-tune>/<run>/`.

settings.json   the settings the run was started with
events.jsonl    what its stages told (components.common.events)
logs/           one file a task, and pipeline.log
kfp/            what Kubeflow Pipelines keeps of the tasks
state.json      how it ended: done, failed or interrupted; absent while it goes on
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

ROOT = Path("runs")


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
        """`done`, `failed`, `interrupted` or `running`."""
        try:
            return json.loads((self.path / "state.json").read_text())["state"]
        except FileNotFoundError:
            return "running"

    def settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        return json.loads(self.settings_path.read_text())

    def begin(self, settings: str) -> None:
        """Makes the directory, or reopens it."""
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        self.settings_path.write_text(settings)
        (self.path / "state.json").unlink(missing_ok=True)

    def end(self, state: str) -> None:
        """Says how the run ended."""
        (self.path / "state.json").write_text(json.dumps({"state": state}) + "\n")


def new_run(fine_tune: str) -> RunDir:
    """Directory of the next run of a fine-tune: run-0001, run-0002, …"""
    numbers = [int(run.name[4:]) for run in runs_of(ROOT / fine_tune)]
    return RunDir(ROOT / fine_tune / f"run-{max(numbers, default=0) + 1:04d}")


def runs_of(folder: Path) -> list[RunDir]:
    """Runs of a fine-tune, oldest first."""
    if not folder.is_dir():
        return []
    return [RunDir(path) for path in sorted(folder.iterdir()) if re.fullmatch(r"run-\d{4,}", path.name)]


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
    """Holds a fine-tune for one run at a time; gives the lock's file descriptor, for the child that works under it.

    Raises:
        StageError: another run of this fine-tune goes on.
    """
    path = ROOT / fine_tune / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise StageError(
                f"fine-tune {fine_tune} has a run going on (process {holder}); wait for it, stop it with "
                f"`kill {holder}`, or start this one under another name: --set fine_tune={fine_tune}-2"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file.fileno()

"""What a stage tells whoever watches: one JSON line an event, in `$GRPO_RUN_DIR/events.jsonl`.

Written by every stage of a local run, read by the live view and by `grpo show`.
Events: `start` (with the key of the work and its work directory), `progress`, `done`, `skipped` (its result was there
already), `failed`.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RUN_DIR_VARIABLE = "GRPO_RUN_DIR"


class Events:
    """Appends events of one task; without a run directory it does nothing."""

    def __init__(self, task: str, *, stage: str, iteration: int | None, shard: int | None) -> None:
        folder = os.environ.get(RUN_DIR_VARIABLE)
        self.run_dir = Path(folder) if folder else None
        self.base = {"task": task, "stage": stage, "iteration": iteration, "shard": shard}

    @property
    def log_path(self) -> Path | None:
        """File of this task's own log."""
        return self.run_dir / "logs" / f"{self.base['task']}.log" if self.run_dir else None

    def own_keys(self) -> set[str]:
        """Keys of the work that this task has started in this run directory."""
        events = read_events(self.run_dir) if self.run_dir else []
        return {event["key"] for event in events if event["task"] == self.base["task"] and "key" in event}

    def emit(self, event: str, **details: Any) -> None:
        """Appends one line; lines of concurrent tasks do not mix since each is one short write."""
        if self.run_dir is None:
            return
        line = json.dumps({"time": time.time(), "event": event, **self.base, **details}) + "\n"
        with (self.run_dir / "events.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode())


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run so far; a line that is still being written is left for the next call."""
    path = run_dir / "events.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def open_tasks(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Task → its start, of those that have not come to an end."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start":
            found[event["task"]] = event
        elif event["event"] != "progress":
            found.pop(event["task"], None)
    return found

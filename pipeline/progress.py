"""How far a run is, out of its events: the running tasks and one record of metrics an iteration."""

import time
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from components.common.settings import RunContext

COLUMNS = (
    ("reward", "reward", "{:.3f}"),
    ("pass@1", "eval/pass@1", "{:.1%}"),
    ("KL", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("clipped", "clip_ratio/region_mean", "{:.3f}"),
    ("length", "completions/mean_length", "{:.1f}"),
    ("loss", "loss", "{:+.4f}"),
)
"""Heading, metric, format: what is shown of an iteration."""
ERRORS = ("errors", "reward/errors", "{:.0f}")
"""Shown when reward functions failed on a completion."""


@dataclass(frozen=True)
class RunningTask:
    """A task that has started and not ended."""

    label: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Progress:
    """A run so far."""

    iteration: int
    running: list[RunningTask]
    records: list[dict[str, Any]]

    @classmethod
    def of(cls, events: list[dict[str, Any]], context: RunContext) -> "Progress":
        """Reads a run's events."""
        open_tasks: dict[str, dict[str, Any]] = {}
        detail: dict[str, str] = {}
        for event in events:
            if event["event"] == "start":
                open_tasks[event["task"]] = event
            elif event["event"] == "progress":
                detail[event["task"]] = _describe(event)
            else:
                open_tasks.pop(event["task"], None)
        running = [
            RunningTask(task, time.time() - event["time"], detail.get(task, "")) for task, event in open_tasks.items()
        ]
        numbers = [event["iteration"] for event in events if event["iteration"] is not None]
        newest = min(max(numbers, default=context.first_iteration), context.last_iteration)
        return cls(newest, running, iteration_records(events))


def _describe(event: dict[str, Any]) -> str:
    share = f"{event['done']:,} of {event['total']:,}"
    figures = " ".join(f"{name} {value:,.4g}" for name, value in event.get("figures", {}).items())
    return f"{share}  {figures}"


def iteration_records(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record an iteration: the metrics its stages reported, and the seconds they took."""
    records: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("done", "skipped") and event["iteration"] is not None and event["stage"] != "configure":
            record = records.setdefault(event["iteration"], {"iteration": event["iteration"], "seconds": 0.0})
            record.update(event.get("metrics", {}))
            if event["event"] == "done":
                record["seconds"] += event["seconds"]
    return [records[number] for number in sorted(records)]


def iteration_table(records: list[dict[str, Any]], *, tail: int | None = None) -> Table:
    """The iterations as a table; only the last `tail` when given."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    columns = [*COLUMNS, ERRORS] if any(record.get(ERRORS[1]) for record in records) else COLUMNS
    for heading in ("iteration", *(heading for heading, _, _ in columns), "seconds"):
        table.add_column(heading, justify="right")
    for record in records[-tail:] if tail else records:
        cells = [form.format(record[name]) if name in record else "" for _, name, form in columns]
        table.add_row(str(record["iteration"]), *cells, f"{record['seconds']:.0f}")
    return table

"""How far a run is, out of its events: the running tasks and one record of metrics an iteration."""

import time
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from components.common.events import open_tasks

COLUMNS = (
    ("pass@1", "evaluate", "eval/pass@1", "{:.1%}"),
    ("reward", "reward", "reward", "{:.3f}"),
    ("length", "reward", "completions/mean_length", "{:.1f}"),
    ("KL", "update", "kl", "{:.4f}"),
    ("entropy", "update", "entropy", "{:.3f}"),
    ("clip", "update", "clip_ratio/region_mean", "{:.3f}"),
    ("loss", "update", "loss", "{:+.4f}"),
)
"""Heading, stage that tells it, metric, format: what is shown of a policy."""
ERRORS = ("errors", "reward", "reward/errors", "{:.0f}")
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
    last_iteration: int
    running: list[RunningTask]
    records: list[dict[str, Any]]

    @classmethod
    def of(cls, events: list[dict[str, Any]], *, iterations: int, since: int = 0) -> "Progress":
        """Reads a run's events; those before `since` are of earlier tries, of which nothing is running any more."""
        recent = events[since:]
        detail = {event["task"]: _describe(event) for event in recent if event["event"] == "progress"}
        running = [
            RunningTask(task, time.time() - event["time"], detail.get(task, ""))
            for task, event in open_tasks(recent).items()
        ]
        numbers = [event["iteration"] for event in recent if event["iteration"] is not None]
        last = min(numbers, default=0) + iterations  # configure comes first and has the start policy's
        return cls(min(max(numbers, default=0), last), last, running, iteration_records(events))


def _describe(event: dict[str, Any]) -> str:
    share = f"{event['done']:,} of {event['total']:,}"
    figures = " ".join(f"{name} {value:,.4g}" for name, value in event.get("figures", {}).items())
    return f"{share}  {figures}"


def iteration_records(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a policy, as in the report: how it was sampled and judged, and the update that made it.

    So the update of iteration *i* belongs to record *i + 1*, with its seconds.
    """
    records: dict[int, dict[str, Any]] = {}
    for event in events:
        stage = event["stage"]
        if event["event"] in ("done", "skipped") and stage in ("rollout", "reward", "evaluate", "update"):
            number = event["iteration"] + (stage == "update")
            record = records.setdefault(number, {"iteration": number, "seconds": {}})
            told = event.get("metrics", {})
            record |= {
                name: told[name] for _, source, name, _ in (*COLUMNS, ERRORS) if source == stage and name in told
            }
            if event["event"] == "done":
                record["seconds"][event["task"]] = event["seconds"]
    return [records[number] for number in sorted(records)]


def iteration_table(records: list[dict[str, Any]], *, tail: int | None = None) -> Table:
    """The iterations as a table; only the last `tail` when given."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    columns = [*COLUMNS, ERRORS] if any(record.get(ERRORS[2]) for record in records) else COLUMNS
    for heading in ("update", *(column[0] for column in columns), "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records[-tail:] if tail else records:
        cells = [form.format(record[name]) if name in record else "" for _, _, name, form in columns]
        table.add_row(str(record["iteration"]), *cells, f"{sum(record['seconds'].values()):.0f}")
    return table

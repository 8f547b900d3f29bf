"""Recurring fine-tunes: one at a time, no catching up, each from the champion and the newest data."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from components.common.errors import SettingsError
from pipeline.connection import ClusterError, call, make_once
from pipeline.settings import PipelineSettings
from pipeline.submitting import Uploaded, check_at_rest, check_for_cluster, named, pages, pipeline_name, split, upload

PART = re.compile(r"(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?")
"""One part of a field's list: *, a number or a range, with a step or without."""
BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
NAMES = ("minute", "hour", "day of month", "month", "day of week")


@dataclass(frozen=True)
class Schedule:
    """A recurring run on the cluster."""

    id: str
    name: str
    cron: str
    enabled: bool


def six_fields(cron: str, timezone: str | None, *, at: datetime | None = None) -> str:
    """Kubeflow's cron (seconds first, in UTC as installed) of a five-field cron in a time zone.

    Kubeflow's scheduler has one time zone for the whole cluster (`CRON_SCHEDULE_TIMEZONE`, UTC by default) and none a
    schedule. A plain hour and minute are shifted by the zone's offset of today; when daylight saving time changes, the
    schedule moves by that hour.

    Raises:
        SettingsError: not five fields, out of range, an unknown zone, or a cron that cannot be shifted.
    """
    fields = cron.split()
    if len(fields) != 5:
        raise SettingsError(f"--cron wants five fields (minute hour day month weekday), got {cron!r}")
    for name, field, (low, high) in zip(NAMES, fields, BOUNDS, strict=True):
        if not all(_fits(part, low, high) for part in field.split(",")):
            raise SettingsError(
                f"--cron: {name} wants {low}-{high}, * or lists and ranges of them, upwards and in steps of at least "
                f"1, got {field!r}"
            )
    fields[4] = ",".join(map(_sunday_first, fields[4].split(",")))
    return " ".join(["0", *(_to_utc(fields, timezone, at) if timezone else fields)])


def _fits(part: str, low: int, high: int) -> bool:
    match = PART.fullmatch(part)
    if match is None:
        return False
    first, last, step = match.groups()
    begin, end = int(first or low), int(last or first or high)
    return low <= begin <= end <= high and int(step or 1) > 0


def _sunday_first(part: str) -> str:
    """A part of the weekdays with 0 for 7: both are Sunday, Kubeflow's parser knows 0 only."""
    first, last, step = PART.fullmatch(part).groups()  # type: ignore[union-attr]
    if "7" not in (first, last):
        return part
    days = range(int(first), int(last or first) + 1, int(step or 1))
    return ",".join(str(day % 7) for day in days)


def _to_utc(fields: list[str], timezone: str, at: datetime | None) -> list[str]:
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise SettingsError(f"--timezone: no zone {timezone!r}; want a name such as Europe/Berlin") from None
    offset = (at or datetime.now(UTC)).astimezone(zone).utcoffset() or timedelta()
    minute, hour, day, month, weekday = fields
    if not offset:
        return fields
    if not (minute.isdigit() and hour.isdigit()):
        raise SettingsError(f"--timezone shifts one fixed hour and minute, got {minute} {hour}; give the cron in UTC")
    total = int(hour) * 60 + int(minute) - int(offset.total_seconds()) // 60
    days, rest = divmod(total, 24 * 60)
    if days and (day, month) != ("*", "*"):
        raise SettingsError(f"--timezone {timezone} moves {hour}:{minute} to another day in UTC; give the cron in UTC")
    if days and weekday != "*":
        if not re.fullmatch(r"\d(,\d)*", weekday):
            raise SettingsError("--timezone shifts lists of weekdays (1,3,5), not ranges; give the cron in UTC")
        weekday = ",".join(str((int(number) + days) % 7) for number in weekday.split(","))
    return [str(rest % 60), str(rest // 60), day, month, weekday]


def schedule(client: Any, settings: PipelineSettings, cron: str, timezone: str | None) -> Schedule:
    """Makes a fine-tune recur.

    Raises:
        SettingsError: the cron, local paths, or more iterations than one run holds.
        ClusterError: refused, or this fine-tune has a schedule already, or a run that goes on.
    """
    fields = six_fields(cron, timezone)
    check_for_cluster(settings)
    if split(settings)[1]:
        raise SettingsError(f"iterations: a scheduled run is one run; lower them to {split(settings)[0].iterations}")
    check_not_recurring(client, settings.fine_tune, disabled_too=True)
    check_at_rest(client, settings.fine_tune)
    recurring = settings.model_copy(update={"start_from": "champion", "skip_unchanged_data": True})
    made = _create(client, recurring, upload(client, recurring), fields)
    return Schedule(made.recurring_run_id, made.display_name, fields, True)


def check_not_recurring(client: Any, fine_tune: str, *, disabled_too: bool = False) -> None:
    """Refuses what a firing could meet: each starts from the champion and may move it.

    Raises:
        ClusterError: this fine-tune has a schedule; the message says how to end it.
    """
    present = [found for found in schedules(client) if found.name == pipeline_name(fine_tune)]
    present = [found for found in present if found.enabled or disabled_too]
    if present:
        raise ClusterError(
            f"fine-tune {fine_tune} recurs already ({present[0].cron}); end that with `grpo unschedule {fine_tune}` "
            f"first, or use another name: --set fine_tune={fine_tune}-2"
        )


def _create(client: Any, settings: PipelineSettings, to: Uploaded, fields: str) -> Any:
    name = pipeline_name(settings.fine_tune)
    return make_once(
        "make the schedule",
        lambda: client.create_recurring_run(
            to.experiment_id,
            name,
            cron_expression=fields,
            max_concurrency=1,
            no_catchup=True,
            pipeline_id=to.pipeline_id,
            version_id=to.version_id,
            service_account=settings.cluster.service_account,
        ),
        lambda: named(client.list_recurring_runs, "recurring_runs", name, **_here(client)),
    )


def _here(client: Any) -> dict[str, Any]:
    return {"namespace": client.get_user_namespace() or None}


def schedules(client: Any) -> list[Schedule]:
    """All recurring fine-tunes."""
    found = pages(client.list_recurring_runs, "recurring_runs", **_here(client))
    return [
        Schedule(
            run.recurring_run_id,
            run.display_name,
            run.trigger.cron_schedule.cron if run.trigger and run.trigger.cron_schedule else "",
            run.status == "ENABLED",
        )
        for run in found
        if run.display_name.startswith("grpo-")
    ]


def unschedule(client: Any, fine_tune: str) -> list[Schedule]:
    """Ends the schedule of a fine-tune; runs that go on are left alone.

    Raises:
        ClusterError: it has none.
    """
    present = [found for found in schedules(client) if found.name == pipeline_name(fine_tune)]
    if not present:
        raise ClusterError(f"fine-tune {fine_tune} has no schedule; `grpo schedules` lists those there are")
    for found in present:
        call("delete the schedule", client.delete_recurring_run, found.id)
    return present

"""The story of a fine-tune: one record an iteration, carried from evaluation to evaluation as `history.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.common.errors import ArtifactError
from components.common.settings import Settings
from components.evaluate.metrics import PASS_AT_1

FILE = "history.json"
SCHEMA_VERSION = 1


class Record(Settings):
    """What is known of one iteration."""

    iteration: int
    """Updates the policy has had that was sampled and judged here."""
    run: str
    """Run of the fine-tune that did it."""
    policy: str
    """Digest of that policy."""
    created: str
    """When it was evaluated: ISO 8601, UTC."""
    metrics: dict[str, float]
    """TRL's names: metrics of this policy's samples and rewards, of the update that made it, and `eval/...`."""
    seconds: dict[str, float] = {}
    """Stage → seconds it took in this iteration."""


def load(path: Path) -> list[Record]:
    """Reads `history.json`. Raises ArtifactError when it is not one."""
    try:
        values = json.loads(path.read_text())
        if values["schema_version"] != SCHEMA_VERSION:
            raise ArtifactError(f"{path.name}: want schema version {SCHEMA_VERSION}, got {values['schema_version']}")
        return [Record.model_validate(record) for record in values["records"]]
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactError(f"{path.name} is not a history: {error}") from None


def save(records: Sequence[Record], path: Path) -> Path:
    """Writes `history.json`; numbers that are not finite are left out, JSON has none."""
    values = {"schema_version": SCHEMA_VERSION, "records": [record.model_dump(mode="json") for record in records]}
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    return path


def extend(records: Sequence[Record], record: Record) -> list[Record]:
    """The history with `record`, in the order of iterations.

    A run begins with the policy the run before ended with and evaluates it again: of the same policy the new figures
    count and the others stay, of another policy the old record is dropped.
    """
    kept = [old for old in records if old.iteration != record.iteration]
    for old in records:
        if (old.iteration, old.policy) == (record.iteration, record.policy):
            changes = {"run": old.run, "metrics": old.metrics | record.metrics, "seconds": old.seconds | record.seconds}
            record = record.model_copy(update=changes)
    return sorted([*kept, record], key=lambda one: one.iteration)


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def evaluated(records: Sequence[Record]) -> list[Record]:
    """Records with held-out metrics; the first is the baseline."""
    return [record for record in records if PASS_AT_1 in record.metrics]

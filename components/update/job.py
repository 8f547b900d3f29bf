"""What the stage hands to its worker processes, and what they hand back: plain files in one folder.

job.json, batch.npz           written by the stage, with `policy/`, `optimizer/`, `reference/` where needed
result.json, next/…           written by the workers; nothing of it counts unless every one ends well
failure-<rank>.json           a worker's error that is meant for the user
"""

import json
from pathlib import Path
from typing import Any, Literal

from components.common import errors
from components.common.settings import Settings
from components.update.config import UpdateSettings


class Job(Settings):
    """One iteration's update."""

    settings: UpdateSettings
    """The stage's settings."""
    seed: int
    """Seed of the iteration's shuffles and dropout."""
    temperature: float
    """Logits are divided by it, as the sampler did."""
    max_completion_length: int
    """The sampler's limit, in tokens; `dr_grpo` divides by it."""
    global_step: int
    """Optimizer steps of the fine-tune before this iteration."""
    num_skipped: int = 0
    """Optimizer steps just before this iteration that were skipped in a row."""
    device: Literal["cpu", "cuda"]
    """Resolved device."""
    dtype: Literal["float32", "bfloat16"]
    """Resolved training type."""
    publish_dtype: Literal["float32", "bfloat16", "float16"]
    """Resolved type of the published weights."""
    restore: Literal["nothing", "moments", "all"]
    """What of `optimizer/` is taken over: `moments` leaves the float32 master weights out."""
    save_optimizer: bool
    """Write `next/optimizer/`."""
    adapter: Literal["none", "fresh", "carried"] = "none"
    """LoRA: train a fresh adapter, or go on with the one in `adapter/`."""
    merge: bool = False
    """LoRA: write merged weights too."""
    adapter_off_is_reference: bool = False
    """LoRA: the base model is the reference, so none is loaded."""


class Result(Settings):
    """What the workers found."""

    metrics: dict[str, float]
    """Metrics of the update, under TRL's names."""
    global_step: int
    """Optimizer steps of the fine-tune, this iteration's included."""
    num_skipped: int = 0
    """Optimizer steps skipped in a row up to the end of this iteration."""


def write_failure(folder: Path, rank: int, error: errors.GrpoError) -> None:
    """Leaves an error for the stage to raise."""
    values = {"type": type(error).__name__, "message": str(error)}
    (folder / f"failure-{rank:05d}.json").write_text(json.dumps(values))


def read_failure(folder: Path) -> errors.GrpoError | None:
    """The error of the lowest rank that left one."""
    for path in sorted(folder.glob("failure-*.json")):
        values: dict[str, Any] = json.loads(path.read_text())
        return getattr(errors, values["type"])(values["message"])
    return None

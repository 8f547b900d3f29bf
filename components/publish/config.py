"""Settings of the publish stage."""

import os
from pathlib import Path

from pydantic import Field

from components.common.errors import SettingsError
from components.common.settings import Settings

EXPORT_MARK = "grpo-policy.json"
"""File of an exported policy that says which one it is."""


class PublishSettings(Settings):
    """When a policy becomes the fine-tune's champion, and where it is offered."""

    metric: str = Field(default="eval/pass@1", min_length=1)
    """Metric of the evaluation that decides; more is better. Any of `eval/pass@k`, `eval/maj@k` can be compared prompt
    by prompt, others only as they are."""
    min_improvement: float = Field(default=0.0, ge=-1.0, allow_inf_nan=False)
    """The metric must exceed the champion's (without one, the baseline's) by more than this: 0.01 is one point of
    pass@1. A negative value accepts a policy that is a little worse."""
    require_significance: bool = False
    """Accept only when the whole 95 % interval of the improvement lies above `min_improvement`."""
    bootstrap_samples: int = Field(default=2000, ge=100, le=100_000)
    """Resamples of the prompts behind that interval."""
    registered_model: str | None = None
    """Name in MLflow's model registry; unset: the name of the fine-tune."""
    export_dir: str | None = None
    """Folder that gets an accepted policy as a plain Hugging Face model; what an earlier export left there is
    replaced."""

    def check_export_dir(self) -> None:
        """Refuses a folder that cannot be written, or that holds something else than an earlier export.

        Raises:
            SettingsError: with the way out.
        """
        if self.export_dir is None:
            return
        folder = Path(self.export_dir).absolute()
        if folder.exists() and not (folder.is_dir() and _may_be_replaced(folder)):
            raise SettingsError(
                f"publish.export_dir = {self.export_dir!r} exists and is no earlier export (no {EXPORT_MARK} in it); "
                "name a new or empty folder"
            )
        above = folder.parent
        if above.exists() and not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise SettingsError(
                f"publish.export_dir = {self.export_dir!r}: nothing can be written to {above}; name another folder"
            )


def _may_be_replaced(folder: Path) -> bool:
    return (folder / EXPORT_MARK).exists() or not any(folder.iterdir())

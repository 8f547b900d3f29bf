"""Settings of the publish stage."""

from pydantic import Field

from components.common.settings import Settings


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

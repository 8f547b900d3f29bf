"""Settings of the evaluate stage."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from components.common.settings import Settings


class EvaluateSettings(Settings):
    """How held-out samples are judged and what the report holds."""

    k_values: tuple[Annotated[int, Field(ge=1)], ...] = (1, 4, 8)
    """pass@k and maj@k for these k; one above `rollout.eval_group_size` is left out, pass@1 is always there."""
    correct_reward: str | None = None
    """Reward function whose value says whether an answer is right; unset: the first function there is."""
    correct_threshold: float = 1.0
    """An answer is right when that reward is at least this; a sample without a reward is wrong."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the answer a majority vote counts (its last match in a completion);
    unset: what follows `####`, else the last `\\boxed{}`, else the last number, else the whole text."""
    bootstrap_samples: int = Field(default=2000, ge=100, le=100_000)
    """Resamples of the prompts behind each 95 % interval."""
    table_rows: int = Field(default=240, ge=0, le=2000)
    """Completions the report shows, at most: the best, the worst and some between, of training and held-out prompts."""
    table_characters: int = Field(default=2000, ge=100, le=100_000)
    """Longest text of one prompt or completion in the report; of a longer one the middle is left out."""
    track: Literal["auto", "every_evaluation", "end_of_run"] = "auto"
    """When MLflow is told: `auto` is every evaluation for a tracking server and the end of the run for a local
    database, since opening that takes 2 to 3 seconds of CPU. Nothing is lost: all iterations are logged then."""

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"answer_pattern is not a regular expression: {error}") from None
        return pattern

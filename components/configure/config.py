"""The run's settings: one section a stage, and the few values that belong to the whole run."""

import re
from collections.abc import Iterator
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from components.common.settings import NAME_PATTERN, RunContext, Settings, TrackingSettings
from components.dataset.config import DatasetSettings
from components.evaluate import metrics
from components.evaluate.config import EvaluateSettings
from components.publish.config import PublishSettings
from components.reward.config import RewardSettings
from components.reward.names import nearest
from components.rollout.config import RolloutSettings
from components.update.config import UpdateSettings

STAGE_SECTIONS = ("dataset", "rollout", "reward", "update", "evaluate", "publish")


class RunSettings(Settings):
    """Everything a run can vary: file, command line, Kubeflow form and reference table derive from these fields."""

    fine_tune: str = Field(pattern=NAME_PATTERN)
    """Name of the fine-tune: a chain of runs that share a champion and an MLflow run."""
    model: str = Field(min_length=1)
    """Base model: a hub id, a local folder, or `s3://bucket/prefix` in the hub's format."""
    store: str = "runs/store"
    """Object store for artifacts: `s3://bucket/prefix?endpoint=...`, `file:///folder`, or a local path."""
    seed: int = 0
    """Every random choice derives from it: the same seed and settings give the same run."""
    start_from: Literal["base", "latest", "champion"] = "base"
    """Start policy: the base model, the fine-tune's last checkpoint, or its champion (the base until there is one)."""
    start_run: str | None = None
    """With `start_from = "latest"`: the run whose last checkpoint it is; unset: the newest of the fine-tune."""
    iterations: int = Field(default=8, ge=1, le=1000)
    """Rollout-reward-update rounds of one run."""
    shards: int = Field(default=1, ge=1, le=64)
    """Rollout jobs an iteration is split over."""
    staleness: Literal[0, 1] = 0
    """0: rollouts sample from the newest policy; 1: from the one before, while the update runs."""
    skip_unchanged_data: bool = False
    """End the run after `dataset` when the data set is the one the champion was trained on; schedules set it."""
    tracking: TrackingSettings = TrackingSettings()
    """MLflow."""
    dataset: DatasetSettings
    """Prompts to train and to evaluate on."""
    rollout: RolloutSettings = RolloutSettings()
    """Sampling."""
    reward: RewardSettings = RewardSettings()
    """Scoring."""
    update: UpdateSettings = UpdateSettings()
    """Training."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Held-out evaluation and the report."""
    publish: PublishSettings = PublishSettings()
    """Acceptance."""

    @field_validator("store")
    @classmethod
    def _can_be_opened(cls, store: str) -> str:
        parts = urlsplit(store) if "://" in store else None
        if parts and not ((parts.scheme == "s3" and parts.netloc) or (parts.scheme == "file" and not parts.netloc)):
            raise ValueError("want s3://bucket/prefix, file:///folder or a local path")
        return store

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.rollout.num_prompts < self.shards:
            yield (
                f"shards: {self.shards} jobs cannot share rollout.num_prompts = {self.rollout.num_prompts}; "
                f"lower shards to {self.rollout.num_prompts} or raise rollout.num_prompts"
            )
        judges = [function.title for function in self.reward.functions]
        if self.evaluate.correct_reward not in (None, *judges):
            yield (
                f"evaluate.correct_reward: want one of the reward functions ({', '.join(judges)}), "
                f"got {self.evaluate.correct_reward!r}"
            )
        buffer, limit = self.update.overlong_buffer, self.rollout.max_completion_length
        if buffer > limit:
            yield (
                f"update.overlong_buffer: the stretch before the length limit must be within "
                f"rollout.max_completion_length = {limit}, got {buffer}"
            )
        if buffer and any(function.name == "soft_overlong" for function in self.reward.functions):
            yield (
                "update.overlong_buffer and the reward function soft_overlong both punish long completions: remove one"
            )
        deciding = metrics.deciding(self.evaluate.k_values, self.rollout.eval_group_size)
        if self.publish.metric not in deciding:
            yield f"publish.metric: no evaluation has {self.publish.metric}{self._way_out(deciding)}"

    def _way_out(self, deciding: list[str]) -> str:
        match = re.fullmatch(r"eval/(pass|maj)@([1-9]\d*)", self.publish.metric)
        if not match or (match[1] == "maj" and int(match[2]) < 3):
            return nearest(self.publish.metric, deciding)
        k, ways = int(match[2]), []
        if k not in (1, *self.evaluate.k_values):
            ways.append(f"add {k} to evaluate.k_values")
        if k > self.rollout.eval_group_size:
            ways.append(f"raise rollout.eval_group_size from {self.rollout.eval_group_size} to {k}")
        return f"; {' and '.join(ways)}"

    def context(self, *, run: str, first_iteration: int) -> RunContext:
        """The part every stage is told."""
        return RunContext(
            fine_tune=self.fine_tune, run=run, store=self.store, seed=self.seed, first_iteration=first_iteration,
            iterations=self.iterations, shards=self.shards, staleness=self.staleness, tracking=self.tracking,
        )  # fmt: skip

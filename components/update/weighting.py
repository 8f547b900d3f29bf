"""From rewards to advantages, and which completions reach the model."""

from dataclasses import replace

import numpy as np

from components.update.advantages import group_advantages
from components.update.batching import Batch
from components.update.config import UpdateSettings
from components.update.shaping import overlong_penalty, scored_lengths


def add_signal(
    batch: Batch, settings: UpdateSettings, max_completion_length: int, kl_S: np.ndarray | None = None
) -> tuple[Batch, dict[str, float]]:
    """The batch with advantages, masks and what is dropped, and the figures about them.

    `kl_S`: summed KL of each completion, when it is part of the reward.
    """
    rewards_SR = batch.rewards
    if settings.overlong_buffer:
        lengths_S = batch.completion_lengths
        penalty_S = overlong_penalty(lengths_S, max_completion_length, settings.overlong_buffer)
        rewards_SR = rewards_SR + settings.overlong_penalty * penalty_S[:, None] / rewards_SR.shape[1]
    if kl_S is not None:
        rewards_SR = rewards_SR - settings.beta * kl_S[:, None] / rewards_SR.shape[1]
    found = group_advantages(
        rewards_SR, batch.group, scale=settings.advantage_scale, baseline=settings.advantage_baseline,
        combine=settings.reward_combination,
    )  # fmt: skip
    lengths_S = scored_lengths(batch.completion_lengths, batch.truncated, settings.mask_truncated)
    keep_S = found.keep_S & (lengths_S > 0)
    figures = {
        "frac_reward_zero_std": found.frac_reward_zero_std,
        "num_groups": float(len(found.zero_std_G)),
        "num_groups_dropped": float(found.zero_std_G.sum()),
        "num_completions": float(len(keep_S)),
        "num_completions_trained": float(keep_S.sum()),
    }
    return replace(batch, advantages=found.advantages_S, scored_lengths=lengths_S, keep=keep_S), figures

"""From rewards to advantages, and which completions reach the model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from components.update.advantages import group_advantages
from components.update.batching import Batch
from components.update.config import UpdateSettings
from components.update.shaping import overlong_penalty, scored_lengths


def shape_rewards(batch: Batch, settings: UpdateSettings, max_completion_length: int) -> Batch:
    """The batch with over-length completions punished and truncated ones masked, as the settings say.

    A total is lowered; where each reward function is normalised by itself, the punishment is a column of its own.
    """
    rewards_SR = batch.rewards
    if settings.overlong_buffer:
        penalty_S = settings.overlong_penalty * overlong_penalty(
            batch.completion_lengths, max_completion_length, settings.overlong_buffer
        )
        penalty_S[np.isnan(rewards_SR).all(axis=1)] = np.nan  # without a reward there is nothing to punish
        alone = rewards_SR.shape[1] == 1 and settings.reward_combination == "sum_then_normalize"
        rewards_SR = rewards_SR + penalty_S[:, None] if alone else np.column_stack([rewards_SR, penalty_S])
    lengths_S = scored_lengths(batch.completion_lengths, batch.truncated, settings.mask_truncated)
    return replace(batch, rewards=rewards_SR, scored_lengths=lengths_S)


def add_advantages(
    batch: Batch, settings: UpdateSettings, weights_R: Sequence[float] = (), *, keep_all: bool = False
) -> tuple[Batch, dict[str, float]]:
    """The batch with its groups' advantages and with what has no signal dropped, and the figures about it.

    `keep_all`: every completion with a reward reaches the model, for what depends on its log-probabilities.
    """
    extra = batch.rewards.shape[1] - len(weights_R)  # the over-length column
    found = group_advantages(
        batch.rewards, batch.group, scale=settings.advantage_scale, baseline=settings.advantage_baseline,
        combine=settings.reward_combination, reward_weights=np.array([*weights_R, *[1.0] * extra]),
    )  # fmt: skip
    signal_S = ~np.isnan(found.rewards_S) if keep_all else found.keep_S
    keep_S = signal_S & (batch.scored_lengths > 0)
    num_groups = len(found.zero_std_G)
    figures = {
        "frac_reward_zero_std": found.frac_reward_zero_std,
        "num_groups": float(num_groups),
        "num_groups_dropped": float(num_groups - len(np.unique(batch.group[keep_S]))),
        "num_completions": float(len(keep_S)),
        "num_completions_trained": float(keep_S.sum()),
    }
    return replace(batch, advantages=found.advantages_S, keep=keep_S), figures

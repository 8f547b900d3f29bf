"""Advantages of groups of completions, on the host, in float64, before anything reaches a GPU.

    S  completions of the batch      R  reward functions      G  groups (one prompt each)

NaN is "no reward": the function did not apply, or the completion could not be scored.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from components.common.errors import DataError

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]

EPSILON = 1e-4
"""Added to a standard deviation before dividing, as TRL does."""
ZERO_SPREAD = 1e-8
"""A group whose rewards spread less than this has no signal: equal sums of floats may differ in the last bit."""


@dataclass(frozen=True)
class Advantages:
    """What the update needs to know of each completion, and of each group for the metrics."""

    advantages_S: np.ndarray
    """float64; 0 where there is no signal."""
    keep_S: np.ndarray
    """bool: the completion carries a signal; all others are dropped before any GPU work."""
    rewards_S: np.ndarray
    """float64 weighted total, NaN where no function applied."""
    zero_std_G: np.ndarray
    """bool: group without a signal: all its rewards equal, or fewer than two of its members have one."""

    @property
    def frac_reward_zero_std(self) -> float:
        """Share of groups without a signal (TRL's metric name); 0 for an empty batch."""
        return float(np.mean(self.zero_std_G)) if len(self.zero_std_G) else 0.0


def group_advantages(
    rewards: np.ndarray,
    group_S: np.ndarray,
    *,
    reward_weights: np.ndarray | None = None,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    combine: Combine = "sum_then_normalize",
    epsilon: float = EPSILON,
) -> Advantages:
    """Advantage of each completion within its group.

    `rewards` is (S,) totals or (S, R) columns (then weighted by `reward_weights`, default 1); `group_S` any integers,
    equal for the completions of one prompt; a group may have lost members.

        baseline mean           A_i = r_i - mean_group(r)                     arXiv:2402.03300
        baseline leave_one_out  A_i = r_i - mean of the others of the group   RLOO, arXiv:2402.14740
        scale group             A_i / (std_group(r) + epsilon)                arXiv:2402.03300
        scale batch             A_i / (std_batch(r) + epsilon)                arXiv:2508.08221
        scale none              A_i                                           arXiv:2503.20783

    Standard deviations have n - 1 below. `normalize_then_sum` is GDPO (arXiv:2601.05242): each column normalised by
    itself within the group, weighted, summed, then divided by the batch's standard deviation (its mean is 0 already);
    `scale` does not apply there.
    """
    columns_SR, weights_R = _columns(rewards, reward_weights)
    _, index_S = np.unique(np.asarray(group_S), return_inverse=True)
    if len(index_S) != len(columns_SR):
        raise ValueError(
            f"one group number a completion is needed: got {len(index_S)} numbers for {len(columns_SR)} completions"
        )
    scored_S = ~np.isnan(columns_SR).all(axis=1)
    rewards_S = np.where(scored_S, np.nansum(columns_SR * weights_R, axis=1), np.nan)
    if combine == "normalize_then_sum":
        advantages_S, spread_G, count_G = _each_normalised(columns_SR, weights_R, index_S, baseline, epsilon)
    elif combine == "sum_then_normalize":
        advantages_S, spread_G, count_G = _normalised(rewards_S, index_S, scale, baseline, epsilon)
    else:
        raise ValueError(f"combine must be sum_then_normalize or normalize_then_sum, got {combine!r}")
    zero_std_G = (count_G < 2) | (spread_G <= ZERO_SPREAD)
    keep_S = scored_S & ~zero_std_G[index_S]
    return Advantages(np.where(keep_S, advantages_S, 0.0), keep_S, rewards_S, zero_std_G)


def _columns(rewards: np.ndarray, reward_weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rewards as float64 (S, R) and one weight a column."""
    columns_SR = np.asarray(rewards, dtype=np.float64)
    columns_SR = columns_SR[:, None] if columns_SR.ndim == 1 else columns_SR
    if np.isinf(columns_SR).any():
        raise DataError("a reward is infinite: its group would have no mean; have the reward function return None")
    num_functions = columns_SR.shape[1]
    weights_R = np.ones(num_functions) if reward_weights is None else np.asarray(reward_weights, dtype=np.float64)
    if weights_R.shape != (num_functions,):
        raise ValueError(f"{num_functions} reward columns need {num_functions} weights, got {weights_R.shape[0]}")
    return columns_SR, weights_R


def _each_normalised(
    columns_SR: np.ndarray, weights_R: np.ndarray, index_S: np.ndarray, baseline: Baseline, epsilon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """GDPO's advantages, and each group's spread and number of rewards."""
    scored_S = ~np.isnan(columns_SR).all(axis=1)
    normal_RS = [_normalised(column_S, index_S, "group", baseline, epsilon)[0] for column_S in columns_SR.T]
    signal_S = np.nansum(np.stack(normal_RS, axis=1) * weights_R, axis=1)
    _, spread_G, count_G = _moments(np.where(scored_S, signal_S, np.nan), index_S)
    return signal_S / (_std(signal_S[scored_S]) + epsilon), spread_G, count_G


def _normalised(
    rewards_S: np.ndarray, index_S: np.ndarray, scale: Scale, baseline: Baseline, epsilon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Advantages (NaN where there is no reward), and each group's spread and number of rewards."""
    mean_G, spread_G, count_G = _moments(rewards_S, index_S)
    centred_S = rewards_S - mean_G[index_S]
    if baseline == "leave_one_out":  # r_i minus the mean of the others
        centred_S = centred_S * (count_G / np.maximum(count_G - 1, 1))[index_S]
    elif baseline != "mean":
        raise ValueError(f"baseline must be mean or leave_one_out, got {baseline!r}")
    if scale == "group":
        centred_S = centred_S / (spread_G[index_S] + epsilon)
    elif scale == "batch":
        centred_S = centred_S / (_std(rewards_S[~np.isnan(rewards_S)]) + epsilon)
    elif scale != "none":
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    return centred_S, spread_G, count_G


def _moments(values_S: np.ndarray, index_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation (n - 1 below) and count of each group's present values; 0 where there are none."""
    num_groups = int(index_S.max()) + 1 if len(index_S) else 0
    present_S = ~np.isnan(values_S)
    count_G = np.bincount(index_S, weights=present_S, minlength=num_groups)
    mean_G = np.bincount(index_S, weights=np.nan_to_num(values_S), minlength=num_groups) / np.maximum(count_G, 1)
    squares_S = np.where(present_S, np.nan_to_num(values_S) - mean_G[index_S], 0.0) ** 2
    variance_G = np.bincount(index_S, weights=squares_S, minlength=num_groups) / np.maximum(count_G - 1, 1)
    return mean_G, np.sqrt(variance_G), count_G


def _std(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

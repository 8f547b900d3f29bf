"""Advantages of groups of completions, on the host, in float64, before anything reaches a GPU.

    S  completions of the batch      R  reward functions      G  groups (one prompt each)

NaN is "no reward": the function did not apply, or the completion could not be scored.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]

EPSILON = 1e-4
"""Added to a standard deviation before dividing, as TRL does."""


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
    raise NotImplementedError

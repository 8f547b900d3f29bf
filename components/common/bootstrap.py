"""How sure a mean over prompts is: the percentile bootstrap, which resamples prompts.

# P prompts, M metrics, R resamples

Samples of one prompt depend on each other (some prompts are easy), so prompts are resampled, never single samples.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
Left out: the bias-corrected variants. When every prompt has the same value the interval has no width, however few the
prompts are; read `num_prompts` beside it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
_CELLS_AT_A_TIME = 4_000_000
"""Bound on memory: values gathered at once (32 MB)."""


def intervals(values_PM: "np.ndarray", *, resamples: int, seed: int) -> "tuple[np.ndarray, np.ndarray]":
    """Lower and upper end of the 95 % interval of each column's mean, each of shape (M,).

    All columns see the same resamples, so a column of differences is a paired bootstrap. The same seed gives the same
    interval.
    """
    import numpy as np

    values_PM = np.asarray(values_PM, dtype=np.float64)
    num_prompts, num_metrics = values_PM.shape
    if num_prompts == 0 or num_metrics == 0:
        empty = np.full(num_metrics, np.nan)
        return empty, empty.copy()
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS_AT_A_TIME // (num_prompts * num_metrics))
    means_RM = np.empty((resamples, num_metrics))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn_RP = rng.integers(0, num_prompts, size=(rows, num_prompts))
        means_RM[start : start + rows] = values_PM[drawn_RP].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low_M, high_M = np.quantile(means_RM, [tail, 1 - tail], axis=0)
    return low_M, high_M


def paired_difference(
    after: dict[str, float], before: dict[str, float], *, resamples: int, seed: int
) -> tuple[float, float, float] | None:
    """Mean of after − before over the prompts both have, with its 95 % interval: (difference, low, high).

    None when the two share no prompt. Pairing removes what is common to both, how hard each prompt is, and so gives a
    narrower interval than two separate ones.
    """
    import numpy as np

    shared = sorted(after.keys() & before.keys())
    if not shared:
        return None
    differences_P1 = np.array([[after[name] - before[name]] for name in shared])
    low_M, high_M = intervals(differences_P1, resamples=resamples, seed=seed)
    return float(differences_P1.mean()), float(low_M[0]), float(high_M[0])

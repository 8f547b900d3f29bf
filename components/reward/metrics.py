"""Metrics of scored completions, under TRL's names.

# N completions, G completions of a prompt (a group)
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from components.common.records import REWARD_PREFIX, iter_groups

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ZERO_STD = 1e-8
"""A spread below this is none, as `torch.isclose` has it."""


def split_metrics(
    completions: "pa.Table", totals_N: "np.ndarray", functions: "Mapping[str, np.ndarray]", num_errors: int
) -> dict[str, float]:
    """Metrics of one split; rewards are NaN where there is none, and a metric without any value is left out.

    `reward_std` is over all completions, as TRL 1.x logs it; `reward_group_std` is the mean of the groups' own, and
    `frac_reward_zero_std` the share of groups without any, which teach nothing. Standard deviations divide by n - 1.
    """
    import numpy as np

    spreads = np.array([_std(totals_N[start:end]) for start, end in iter_groups(completions)])
    metrics = {
        "reward": _mean(totals_N),
        "reward_std": _std(totals_N),
        "reward_group_std": _mean(spreads),
        "frac_reward_zero_std": float(np.mean(np.nan_to_num(spreads, nan=np.inf) < ZERO_STD)) if len(spreads) else 0.0,
        "reward/errors": float(num_errors),
    }
    for name, values_N in functions.items():
        metrics |= {
            f"{REWARD_PREFIX}{name}/mean": _mean(values_N),
            f"{REWARD_PREFIX}{name}/std": _std(values_N),
        }
    metrics |= _lengths(completions)
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _lengths(completions: "pa.Table") -> dict[str, float]:
    """Lengths in tokens and the share that was cut, over the completions that were generated."""
    import numpy as np
    import pyarrow.compute as pc

    generated = completions.filter(pc.not_equal(completions.column("finish_reason"), "error"))
    if not generated.num_rows:
        return {}
    lengths_N = pc.list_value_length(generated.column("completion_ids")).to_numpy()
    clipped_N = pc.equal(generated.column("finish_reason"), "length").to_numpy()
    return {
        "completions/mean_length": float(np.mean(lengths_N)),
        "completions/min_length": float(np.min(lengths_N)),
        "completions/max_length": float(np.max(lengths_N)),
        "completions/clipped_ratio": float(np.mean(clipped_N)),
    }


def _mean(values: "np.ndarray") -> float:
    import numpy as np

    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _std(values: "np.ndarray") -> float:
    import numpy as np

    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")

"""What held-out samples say about a policy: pass@k, maj@k, length and truncation, with intervals over prompts.

# P prompts, N samples of one prompt, k samples looked at, M metrics

A sample is *right* when its reward reaches the threshold; one without a reward (no function applied, generation
failed) is wrong. Every rate is a mean over prompts of a value per prompt, so prompts weigh the same however many
samples they have.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, prod

PREFIX = "eval/"
PASS_AT_1 = "eval/pass@1"
PLAIN = ("eval/reward", "eval/completions/mean_length", "eval/completions/clipped_ratio")
"""Metrics over all samples, without an interval."""
_EXACT_SUBSETS = 300
"""Up to so many k-subsets of a prompt's samples a majority vote is averaged over all of them."""
_DRAWN_SUBSETS = 100
"""Subsets drawn, seeded, when there are more."""


@dataclass(frozen=True)
class Samples:
    """The N samples of one prompt."""

    prompt_id: str
    right: Sequence[bool]
    answers: Sequence[str]
    lengths: Sequence[int]
    truncated: Sequence[bool]
    rewards: Sequence[float | None]

    def __len__(self) -> int:
        return len(self.right)


@dataclass(frozen=True)
class Evaluation:
    """`metrics` of one policy, and the values per prompt they are means of: metric → prompt id → value."""

    metrics: dict[str, float]
    per_prompt: dict[str, dict[str, float]]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right, estimated without bias from N >= k samples.

    1 - C(N - c, k) / C(N, k), as the product prod_{i=N-c+1..N} (1 - k / i), which does not overflow
    (Chen et al. 2021, arXiv:2107.03374, equation 1 and figure 3).
    """
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(num_samples - num_right + 1, num_samples + 1))


def maj_at_k(right: Sequence[bool], answers: Sequence[str], k: int, *, seed: int = 0) -> float:
    """Chance that the most frequent answer among k of the N samples is right; tied answers share the vote.

    The mean over all k-subsets when they are few, over seeded draws when they are many. An answer counts as right by
    the share of its samples that are (all or none, unless the reward looks at more than the answer).
    """
    num_samples = len(right)
    if comb(num_samples, k) <= _EXACT_SUBSETS:
        subsets = list(combinations(range(num_samples), k))
    else:
        import numpy as np

        rng = np.random.default_rng(seed)
        subsets = [tuple(rng.choice(num_samples, size=k, replace=False)) for _ in range(_DRAWN_SUBSETS)]
    return sum(_vote(right, answers, subset) for subset in subsets) / len(subsets)


def _vote(right: Sequence[bool], answers: Sequence[str], subset: Sequence[int]) -> float:
    counts = Counter(answers[i] for i in subset)
    most = max(counts.values())
    winners = {answer for answer, count in counts.items() if count == most}
    return sum(right[i] for i in subset if answers[i] in winners) / (most * len(winners))


def usable_ks(k_values: Sequence[int], num_samples: int) -> list[int]:
    """The k that `num_samples` samples of a prompt are enough for; 1 is always among them."""
    return sorted(k for k in {1, *k_values} if k <= num_samples)


def _rates(ks: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Name → kind and k of the metrics that are means over prompts."""
    voted = [k for k in ks if k > 2]  # of one or two samples no majority can differ from their mean
    rates = [("pass", k) for k in ks] + [("maj", k) for k in voted]
    return {f"{PREFIX}{kind}@{k}": (kind, k) for kind, k in rates}


def deciding(k_values: Sequence[int], num_samples: int) -> list[str]:
    """Names of the metrics a policy may be accepted by, from `num_samples` samples of every held-out prompt."""
    return [*_rates(usable_ks(k_values, num_samples)), *PLAIN]


def evaluate(prompts: Sequence[Samples], k_values: Sequence[int], *, resamples: int, seed: int) -> Evaluation:
    """All metrics of one policy's held-out samples; none when there are no samples."""
    import numpy as np

    from components.common.bootstrap import intervals

    if not prompts:
        return Evaluation({}, {})
    ids = [samples.prompt_id for samples in prompts]
    columns = _per_prompt(prompts, usable_ks(k_values, min(map(len, prompts))), seed)
    names = list(columns)
    values_PM = np.array([columns[name] for name in names], dtype=np.float64).T
    low_M, high_M = intervals(values_PM, resamples=resamples, seed=seed)
    metrics: dict[str, float] = {}
    for name, mean, low, high in zip(names, values_PM.mean(axis=0), low_M, high_M, strict=True):
        metrics |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
    metrics |= _plain(prompts)
    per_prompt = {name: dict(zip(ids, map(float, columns[name]), strict=True)) for name in names}
    return Evaluation(metrics, per_prompt)


def _per_prompt(prompts: Sequence[Samples], ks: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Metric → one value a prompt, for the metrics that carry an interval."""
    columns: dict[str, list[float]] = {}
    for name, (kind, k) in _rates(ks).items():
        columns[name] = [
            pass_at_k(len(group), sum(group.right), k) if kind == "pass"
            else maj_at_k(group.right, group.answers, k, seed=seed)
            for group in prompts
        ]  # fmt: skip
    return columns


def _plain(prompts: Sequence[Samples]) -> dict[str, float]:
    """Metrics over all samples, without an interval."""
    num_samples = sum(len(group) for group in prompts)
    rewards = [reward for group in prompts for reward in group.rewards if reward is not None]
    found = {
        f"{PREFIX}completions/mean_length": sum(sum(group.lengths) for group in prompts) / num_samples,
        f"{PREFIX}completions/clipped_ratio": sum(sum(group.truncated) for group in prompts) / num_samples,
        f"{PREFIX}num_prompts": float(len(prompts)),
        f"{PREFIX}num_samples": float(num_samples),
    }
    if rewards:
        found[f"{PREFIX}reward"] = sum(rewards) / len(rewards)
    return found


def gain_over(now: Evaluation, baseline: dict[str, dict[str, float]], *, resamples: int, seed: int) -> dict[str, float]:
    """`..._gain` of each metric over the baseline's values per prompt, with a paired interval."""
    from components.common.bootstrap import paired_difference

    found: dict[str, float] = {}
    for name in now.per_prompt.keys() & baseline.keys():
        difference = paired_difference(now.per_prompt[name], baseline[name], resamples=resamples, seed=seed)
        if difference is not None:
            found |= dict(zip((f"{name}_gain", f"{name}_gain_low", f"{name}_gain_high"), difference, strict=True))
    return found

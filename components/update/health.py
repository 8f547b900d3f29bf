"""Limits of a healthy update. Crossing one stops the run: nothing is published, the last good policy stays."""

from collections.abc import Mapping

from components.common.errors import HealthError
from components.update.config import UpdateSettings


def check_zero_std_share(settings: UpdateSettings, share: float) -> None:
    """Before any model is loaded. Raises HealthError when too many groups carry no signal."""
    limit = settings.health.max_zero_std_share
    if limit is not None and share > limit:
        raise HealthError(
            f"{share:.0%} of the groups have equal rewards (health.max_zero_std_share = {limit:g}): the prompts are "
            "too easy or too hard for this policy, or a reward function is constant"
        )


def check_figures(settings: UpdateSettings, figures: Mapping[str, float]) -> None:
    """After the last optimizer step, before anything is written. Raises HealthError naming the limit crossed."""
    for name, limit, sign, setting, mend in _limits(settings):
        value = figures.get(name)
        if value is not None and not sign * (value - limit) <= 0:  # NaN and infinity are no healthy figures either
            raise HealthError(f"{name} is {value:.4g} (health.{setting} = {limit:g}); {mend}")


def unchecked(settings: UpdateSettings, figures: Mapping[str, float]) -> list[str]:
    """Settings of limits whose figure is not there: no step was taken, or the sampler gave no log-probabilities."""
    return [f"health.{setting}" for name, _, _, setting, _ in _limits(settings) if name not in figures]


def _limits(settings: UpdateSettings) -> list[tuple[str, float, int, str, str]]:
    """Of each limit that is set: the figure, its limit, 1 for a highest and -1 for a lowest, the setting, the mend."""
    health = settings.health
    limits = [
        ("kl", health.max_kl, 1, "max_kl", "the policy has left the reference: raise beta or lower learning_rate"),
        ("sampling/sampling_logp_difference/mean", health.max_logp_difference, 1, "max_logp_difference",
         "sampler and trainer disagree: check that both read the same weights, type and sampling parameters"),
        ("sampling/kl_k3", health.max_sampling_kl, 1, "max_sampling_kl",
         "sampler and trainer disagree: check that both read the same weights, type and sampling parameters"),
        ("entropy", health.min_entropy, -1, "min_entropy",
         "sampling has collapsed: raise entropy_coefficient or epsilon_high, or lower learning_rate"),
    ]  # fmt: skip
    return [(name, limit, *rest) for name, limit, *rest in limits if limit is not None]

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
    health = settings.health
    difference = "sampling/sampling_logp_difference/mean"
    limits = [
        ("kl", health.max_kl, 1, "max_kl", "the policy has left the reference: raise beta or lower learning_rate"),
        (difference, health.max_logp_difference, 1, "max_logp_difference",
         "sampler and trainer disagree: check that both read the same weights, type and sampling parameters"),
        ("entropy", health.min_entropy, -1, "min_entropy",
         "sampling has collapsed: raise entropy_coefficient or epsilon_high, or lower learning_rate"),
    ]  # fmt: skip
    for name, limit, sign, setting, mend in limits:
        if limit is not None and name in figures and sign * (figures[name] - limit) > 0:
            raise HealthError(f"{name} is {figures[name]:.4g} (health.{setting} = {limit:g}); {mend}")

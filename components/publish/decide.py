"""Accept or reject: the candidate's metric against the champion's, or the baseline's when there is no champion."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from components.common.bootstrap import paired_difference


@dataclass(frozen=True)
class Contender:
    """A policy and what was measured of it."""

    role: Literal["candidate", "champion", "baseline"]
    digest: str
    iteration: int
    run: str
    value: float
    low: float | None = None
    high: float | None = None
    per_prompt: Mapping[str, float] | None = None
    """Prompt id → value; none for a metric that is not a mean over prompts."""


@dataclass(frozen=True)
class Difference:
    """Candidate minus rival, with the 95 % interval of a paired comparison where one was possible."""

    value: float
    low: float | None
    high: float | None
    paired_prompts: int


@dataclass(frozen=True)
class Rule:
    """What is asked of a candidate."""

    metric: str
    min_improvement: float
    require_significance: bool
    resamples: int
    seed: int


@dataclass(frozen=True)
class Decision:
    """The outcome and its reason."""

    accepted: bool
    reason: str
    rule: Rule
    candidate: Contender
    rival: Contender | None
    difference: Difference | None

    def dump(self) -> dict[str, Any]:
        """As plain JSON values, without the values per prompt."""
        values = asdict(self)
        for contender in (values["candidate"], values["rival"]):
            if contender:
                del contender["per_prompt"]
        return values


def decide(candidate: Contender, rival: Contender | None, rule: Rule) -> Decision:
    """Applies the rule. The candidate is accepted when it exceeds its rival by more than `min_improvement`."""
    if rival is None:
        reason = f"There is neither a champion nor a baseline with {rule.metric}: the first policy is accepted."
        return Decision(True, reason, rule, candidate, None, None)
    if rival.digest == candidate.digest:
        reason = f"The policy is the {rival.role} itself."
        return Decision(False, reason, rule, candidate, rival, None)
    difference = _difference(candidate, rival, rule)
    reached = difference.value if not rule.require_significance else difference.low
    accepted = reached is not None and reached > rule.min_improvement
    return Decision(accepted, _reason(accepted, rival, rule, difference), rule, candidate, rival, difference)


def _difference(candidate: Contender, rival: Contender, rule: Rule) -> Difference:
    """Paired over the prompts both were measured on; plain when they share none."""
    after, before = candidate.per_prompt or {}, rival.per_prompt or {}
    paired = paired_difference(dict(after), dict(before), resamples=rule.resamples, seed=rule.seed)
    if paired is None:
        return Difference(candidate.value - rival.value, None, None, 0)
    return Difference(*paired, len(after.keys() & before.keys()))


def _reason(accepted: bool, rival: Contender, rule: Rule, difference: Difference) -> str:
    change = f"{rule.metric} is {_signed(difference.value)} against the {rival.role}"
    if difference.paired_prompts:
        change += (
            f" over {difference.paired_prompts:,} shared prompts "
            f"(95 % interval {_signed(difference.low)} to {_signed(difference.high)})"
        )
    else:
        change += ", measured on other prompts"
    if rule.require_significance and difference.low is None:
        return f"{change}; require_significance asks for shared prompts."
    what = "its interval" if rule.require_significance else "it"
    verb = "lies" if rule.require_significance else "is"
    return f"{change}; {what} {verb} {'' if accepted else 'not '}above {_signed(rule.min_improvement)}."


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.4f}".replace("-", "−")

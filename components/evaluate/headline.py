"""The result in one figure and one sentence: pass@1 before and after, with how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.evaluate.charts import number
from components.evaluate.history import Record, evaluated
from components.evaluate.metrics import PASS_AT_1, PREFIX


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Headline:
    """`before` is the baseline, the first evaluation of the fine-tune; `after` the latest."""

    before: Rate
    after: Rate
    first: int
    last: int
    num_prompts: int
    samples_a_prompt: int
    gain: Rate | None

    @property
    def is_baseline(self) -> bool:
        """There is one evaluation only."""
        return self.first == self.last

    @property
    def sentence(self) -> str:
        """What happened, in words."""
        if self.is_baseline:
            return f"The baseline, 95 % interval {_interval(self.after)}; later evaluations are held against it."
        updates = self.last - self.first
        done = f"{updates} update{'s' if updates != 1 else ''}"
        gain = self.gain or Rate(self.after.value - self.before.value, float("nan"), float("nan"))
        points = f"{abs(gain.value) * 100:.1f} points"
        if gain.value == 0:
            verb = f"{done} left pass@1 where it was"
        else:
            verb = f"{done} {'raised' if gain.value > 0 else 'lowered'} pass@1 by {points}"
        if self.gain is None:
            return f"{verb}. Now {_interval(self.after)} with 95 % confidence."
        sure = "" if gain.low > 0 or gain.high < 0 else " The interval includes no change."
        return f"{verb} (95 % interval {_points(gain.low)} to {_points(gain.high)}).{sure}"


def headline(records: Sequence[Record]) -> Headline | None:
    """None when nothing was evaluated yet."""
    found = evaluated(records)
    if not found:
        return None
    first, last = found[0], found[-1]
    prompts = last.metrics.get(f"{PREFIX}num_prompts", 0.0)
    samples = last.metrics.get(f"{PREFIX}num_samples", 0.0)
    return Headline(
        before=_rate(first, PASS_AT_1),
        after=_rate(last, PASS_AT_1),
        first=first.iteration,
        last=last.iteration,
        num_prompts=round(prompts),
        samples_a_prompt=round(samples / prompts) if prompts else 0,
        gain=_rate(last, f"{PASS_AT_1}_gain") if f"{PASS_AT_1}_gain" in last.metrics else None,
    )


def _rate(record: Record, name: str) -> Rate:
    value = record.metrics[name]
    return Rate(value, record.metrics.get(f"{name}_low", value), record.metrics.get(f"{name}_high", value))


def _interval(rate: Rate) -> str:
    return f"{number(rate.low, 'percent')} to {number(rate.high, 'percent')}"


def _points(value: float) -> str:
    return f"{value * 100:+.1f}".replace("-", "−")

"""Which curves the report draws, from which metrics."""

import re
from collections.abc import Sequence

from components.evaluate.charts import Chart, Line
from components.evaluate.history import Record
from components.evaluate.metrics import PASS_AT_1

STAGES = ("rollout", "reward", "update", "evaluate")


def points(records: Sequence[Record], metric: str) -> dict[int, float]:
    """A metric by iteration, where it was measured."""
    return {record.iteration: record.metrics[metric] for record in records if metric in record.metrics}


def largest_k(records: Sequence[Record], kind: str) -> int | None:
    """The largest k of `pass@k` or `maj@k` that was measured."""
    names = {name for record in records for name in record.metrics}
    found = [int(match[1]) for name in names if (match := re.fullmatch(rf"eval/{kind}@(\d+)", name))]
    return max(found, default=None)


def curve_panels(records: Sequence[Record]) -> list[Chart]:
    """The six panels every report speaks of, drawn when they have values, then further ones that have."""
    required = [
        _solved(records),
        Chart(
            "reward",
            "Reward",
            "Mean weighted total of the samples.",
            _lines(records, training="reward", held_out="eval/reward"),
        ),
        Chart(
            "length",
            "Completion length",
            "Mean, in tokens.",
            _lines(records, training="completions/mean_length", held_out="eval/completions/mean_length"),
            "tokens",
        ),
        Chart(
            "kl",
            "KL to the start policy",
            "In nats a token, on training samples; measured when a KL coefficient is set.",
            _lines(records, KL="kl"),
        ),
        Chart(
            "entropy",
            "Entropy",
            "Of the next token, in nats; a fall to zero means exploration has ended.",
            _lines(records, entropy="entropy"),
        ),
        Chart(
            "clip",
            "Clipped tokens",
            "Share of tokens whose probability ratio left the trust region.",
            _lines(records, all="clip_ratio/region_mean", above="clip_ratio/high_mean", below="clip_ratio/low_mean"),
            "percent",
        ),
    ]
    return required + [panel for panel in _further(records) if panel.drawn]


def times_panel(records: Sequence[Record]) -> Chart:
    """Seconds a stage, stacked by iteration."""
    names = [*STAGES, *sorted({name for record in records for name in record.seconds} - set(STAGES))]
    lines = [Line(name, {r.iteration: r.seconds[name] for r in records if name in r.seconds}) for name in names]
    return Chart("times", "Seconds by update", "", [line for line in lines if line.points], "seconds", stacked=True)


def _solved(records: Sequence[Record]) -> Chart:
    low, high = points(records, f"{PASS_AT_1}_low"), points(records, f"{PASS_AT_1}_high")
    lines = [Line("pass@1", points(records, PASS_AT_1), low, high)]
    most = largest_k(records, "pass") or 1
    if most > 1:
        lines.append(Line(f"pass@{most}", points(records, f"eval/pass@{most}")))
    note = "Share of held-out prompts; the band is the 95 % interval of pass@1."
    return Chart("pass", "Solved, held-out", note, lines, "percent", 0.0, 1.0)


def _further(records: Sequence[Record]) -> list[Chart]:
    return [
        Chart(
            "signal",
            "Groups without signal",
            "Share of training groups whose samples all got the same reward.",
            _lines(records, no_signal="frac_reward_zero_std"),
            "percent",
            ceiling=1.0,
        ),
        Chart(
            "truncated",
            "Truncated completions",
            "Share that reached the length limit.",
            _lines(records, training="completions/clipped_ratio", held_out="eval/completions/clipped_ratio"),
            "percent",
        ),
        Chart(
            "mismatch",
            "Generator against trainer",
            "Mean difference of log-probabilities for the same tokens, in nats.",
            _lines(records, difference="sampling/sampling_logp_difference/mean"),
        ),
        Chart(
            "errors",
            "Reward errors",
            "Completions that a reward function failed on, or that were not generated.",
            _errors(records),
            "count",
        ),
    ]


def _errors(records: Sequence[Record]) -> list[Line]:
    """A panel only of what went wrong: no line where nothing did."""
    lines = _lines(records, training="reward/errors", held_out="eval/reward/errors")
    return [line for line in lines if any(line.points.values())]


def _lines(records: Sequence[Record], **metrics: str) -> list[Line]:
    """Name of a line (an underscore is a hyphen) → its metric."""
    return [Line(name.replace("_", "-"), points(records, metric)) for name, metric in metrics.items()]

"""The summary: a few lines of Markdown for the KFP UI, the console and pull requests."""

from collections.abc import Sequence

from components.evaluate.charts import number
from components.evaluate.headline import headline
from components.evaluate.history import Record

_COLUMNS = (
    ("pass@1", "eval/pass@1", "percent"),
    ("Reward", "reward", "number"),
    ("No signal", "frac_reward_zero_std", "percent"),
    ("Tokens", "completions/mean_length", "tokens"),
    ("KL", "kl", "number"),
    ("Entropy", "entropy", "number"),
    ("Clipped", "clip_ratio/region_mean", "percent"),
    ("Reward errors", "reward/errors", "count"),
    ("Held-out reward errors", "eval/reward/errors", "count"),
)
_LAST = 20
"""Rows of the table, the latest ones."""


def markdown(fine_tune: str, records: Sequence[Record]) -> str:
    """Headline and a table of the latest iterations; a column that nothing fills, or no error, is left out."""
    result = headline(records)
    lines = [f"# {fine_tune}", ""]
    if result is None:
        lines += ["No held-out prompts were sampled yet.", ""]
    else:
        before = "" if result.is_baseline else f"{number(result.before.value, 'percent')} → "
        after = f"**{number(result.after.value, 'percent')}**"
        lines += [f"pass@1 on {result.num_prompts:,} held-out prompts: {before}{after}", "", result.sentence, ""]
    columns = [column for column in _COLUMNS if _is_filled(records, column[1])]
    lines += ["| Update | " + " | ".join(title for title, _, _ in columns) + " |", "|---:|" + "---:|" * len(columns)]
    for record in records[-_LAST:]:
        cells = [number(record.metrics[name], form) if name in record.metrics else "" for _, name, form in columns]
        lines.append(f"| {record.iteration} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("\u202f", " ") + "\n"


def _is_filled(records: Sequence[Record], name: str) -> bool:
    values = [record.metrics[name] for record in records if name in record.metrics]
    return any(values) if name.endswith("errors") else bool(values)

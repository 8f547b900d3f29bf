"""The summary in Markdown: which columns its table has."""

import pytest

from components.evaluate.history import Record
from components.evaluate.summary import markdown


def records(*metrics):
    return [
        Record(iteration=i, run="r", policy="blake3:0", created="2026-01-02T03:04:05+00:00", metrics=values)
        for i, values in enumerate(metrics)
    ]


@pytest.mark.parametrize(
    ("metrics", "head"),
    [
        (({"reward": 0.5, "kl": 0.0, "reward/errors": 0.0}, {"reward": 0.5}), "| Update | Reward | KL |"),
        (({"reward": 0.5}, {"reward": 0.5, "reward/errors": 36.0}), "| Update | Reward | Reward errors |"),
        (({"reward": 0.5, "eval/reward/errors": 1.0},), "| Update | Reward | Held-out reward errors |"),
    ],
)
def test_errors_have_a_column_when_there_are_any(metrics, head):
    lines = markdown("f", records(*metrics)).splitlines()
    assert head in lines
    assert lines[-1].endswith(("| 0.500 | 36 |", "| 0.500 | 1 |") if "errors" in head else "| 0.500 |  |")

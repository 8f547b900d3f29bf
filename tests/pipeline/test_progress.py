"""The table of a run's iterations, and the line of a stage that is done."""

import pytest

from pipeline.live import _headline
from pipeline.progress import iteration_table


@pytest.mark.parametrize(("errors", "shown"), [((0.0, 0.0), []), ((0.0, 36.0), ["0", "36"])])
def test_errors_of_reward_functions_are_a_column_when_there_are_any(errors, shown):
    records = [
        {"iteration": i, "seconds": {"reward": 1.0}, "reward": 0.5, "reward/errors": count}
        for i, count in enumerate(errors)
    ]
    columns = {str(column.header): list(column.cells) for column in iteration_table(records).columns}
    assert columns.get("errors", []) == shown


def test_a_reward_stage_tells_of_errors():
    metrics = {"reward": 0.5, "reward/errors": 3.0, "eval/reward/errors": 0.0, "loss": 1.0}
    assert _headline({"stage": "reward", "metrics": metrics}) == {"reward": 0.5, "reward/errors": 3.0}
    assert _headline({"stage": "reward", "metrics": metrics | {"reward/errors": 0.0}}) == {"reward": 0.5}

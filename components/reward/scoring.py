"""Scores a table of completions: batches of whole groups to workers, and one completion at a time where a batch fails.

# N completions, F reward functions
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from components.common.records import MESSAGES, completion_fields, data_columns, iter_groups
from components.reward.config import RewardFunction
from components.reward.crew import Crew
from components.reward.process import WorkerLost
from components.reward.resolve import FROM_RECORDS

if TYPE_CHECKING:
    import pyarrow as pa

Progress = Callable[[int, int], None]
SECONDS_BETWEEN_PROGRESS = 5.0


@dataclass
class Scores:
    """What one function gave: `values_N`, None where it does not apply, and the errors by row."""

    values_N: list[float | None]
    errors: dict[int, str] = field(default_factory=dict)


def score_table(crew: Crew, table: "pa.Table", progress: Progress) -> list[Scores]:
    """Scores all rows with all functions, in the order of the settings; needs `crew.check` before.

    Rows whose generation failed are no function's business: no value and no error.
    """
    import numpy as np

    functions = crew.settings.functions
    rows_N = np.flatnonzero(np.asarray(table.column("finish_reason").to_pylist(), dtype=object) != "error")
    finished = table if len(rows_N) == table.num_rows else table.take(rows_N)
    batches = list(make_batches(finished, crew.settings.batch_size))
    results = [Scores([None] * table.num_rows) for _ in functions]
    report = _throttled(progress, len(batches) * len(functions))

    def work(function: RewardFunction, scores: Scores, start: int, stop: int) -> None:
        values, errors = _score_batch(crew, function, finished.slice(start, stop - start))
        for position, value in enumerate(values):
            scores.values_N[int(rows_N[start + position])] = value
        scores.errors.update({int(rows_N[start + position]): text for position, text in errors.items()})
        report()

    num_workers = min(crew.settings.num_workers or len(os.sched_getaffinity(0)), max(1, len(batches)))
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for function, scores in zip(functions, results, strict=True):
                tasks = [pool.submit(work, function, scores, *batch) for batch in batches]
                for task in tasks:
                    task.result()
                crew.dismiss(function)
        except BaseException:  # a failed task or Ctrl-C: nobody waits for the others
            pool.shutdown(wait=False, cancel_futures=True)
            crew.stop()
            raise
    return results


def make_batches(table: "pa.Table", size: int) -> Iterator[tuple[int, int]]:
    """Start and end rows of batches of whole groups, at most `size` rows each unless a group alone is larger."""
    start = end = 0
    for group_start, group_end in iter_groups(table):
        if end > start and group_end - start > size:
            yield start, group_start
            start = group_start
        end = group_end
    if end > start:
        yield start, end


def _score_batch(crew: Crew, function: RewardFunction, rows: "pa.Table") -> tuple[list[float | None], dict[int, str]]:
    """One function over one batch; if its worker is lost, over each completion alone."""
    inputs = rows.select([]) if rows.num_rows == 0 else _inputs(rows, crew.parameters[function.title], function)
    settings = crew.settings
    try:
        return _ask(crew, function, inputs, settings.batch_timeout_seconds)
    except WorkerLost as error:
        crew.count_lost(function, str(error))
    values: list[float | None] = []
    errors: dict[int, str] = {}
    for position in range(rows.num_rows):
        try:
            (value,), failed = _ask(crew, function, inputs.slice(position, 1), settings.timeout_seconds)
            if failed:
                errors[position] = failed[0]
        except WorkerLost as error:
            crew.count_lost(function, str(error))
            value, errors[position] = settings.error_score, str(error)
        values.append(value)
    return values, errors


def _ask(
    crew: Crew, function: RewardFunction, inputs: "pa.Table", seconds: float
) -> tuple[list[float | None], dict[int, str]]:
    with crew.worker(function) as worker:
        values, errors = worker.score(_encoded(inputs), inputs.num_rows, seconds)
    return [crew.settings.error_score if row in errors else value for row, value in enumerate(values)], errors


def _inputs(rows: "pa.Table", parameters: dict[str, str], function: RewardFunction) -> "pa.Table":
    import pyarrow as pa

    inputs = {name: rows.column(column) for name, column in parameters.items()}
    if function.messages and "prompts" in parameters:
        inputs["prompts"] = _messages(rows, parameters["prompts"])
    return pa.table(inputs)


def _messages(rows: "pa.Table", column: str) -> "pa.ChunkedArray | pa.Array":
    """Prompts as chat messages in JSON: those they were rendered from, or the column's plain text as a user's."""
    import pyarrow as pa

    if column == FROM_RECORDS["prompts"] and MESSAGES in rows.column_names:
        column = MESSAGES
    if column == MESSAGES:
        return rows.column(MESSAGES)
    texts = rows.column(column).to_pylist()
    return pa.array([json.dumps([{"role": "user", "content": text}]) for text in texts], pa.string())


def _encoded(table: "pa.Table") -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def own_columns(table: "pa.Table") -> list[str]:
    """The data set's own columns: what reward functions may ask for by name."""
    return data_columns(table, completion_fields())


def _throttled(progress: Progress, total: int) -> Callable[[], None]:
    """Counts finished batches and reports every few seconds."""
    lock, state = threading.Lock(), {"done": 0, "told": time.monotonic()}

    def report() -> None:
        with lock:
            state["done"] += 1
            due = time.monotonic() - state["told"] >= SECONDS_BETWEEN_PROGRESS
            if due:
                state["told"] = time.monotonic()
                progress(int(state["done"]), total)

    return report

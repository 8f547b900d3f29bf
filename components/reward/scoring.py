"""Scores a table of completions: batches of whole groups to workers, and one completion at a time where a batch fails.

# N completions, F reward functions
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import DataError, StageError
from components.common.records import completion_fields, data_columns, iter_groups
from components.reward.config import RewardFunction, RewardSettings
from components.reward.process import Worker, WorkerLost
from components.reward.resolve import NotUsable, bind
from components.reward.sandbox import unreadable

if TYPE_CHECKING:
    import pyarrow as pa

Progress = Callable[[int, int], None]
SECONDS_BETWEEN_PROGRESS = 5.0


@dataclass
class Scores:
    """What one function gave: `values_N`, None where it does not apply, and the errors by row."""

    values_N: list[float | None]
    errors: dict[int, str] = field(default_factory=dict)


class Crew:
    """The workers of a stage: starts them as needed, checks every function before anything is scored."""

    def __init__(self, settings: RewardSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.parameters: dict[str, dict[str, str]] = {}
        self._idle: dict[str, list[Worker]] = {function.title: [] for function in settings.functions}
        self._lock = threading.Lock()
        self._lost = 0

    def check(self, data: list[str]) -> list[str]:
        """Loads every function and binds its parameters to columns; gives what of the confinement could not be had.

        Raises:
            DataError: a function is missing or cannot be called with the columns `data`; every problem at once.
        """
        problems: list[str] = []
        missing: list[str] = []
        workers = [Worker(function, self.settings, self.folder) for function in self.settings.functions]
        for worker in workers:
            function = worker.function
            self._idle[function.title].append(worker)
            try:
                wanted, missing = worker.ready()
                self.parameters[function.title] = bind(wanted, data, function.columns, function.arguments)
            except NotUsable as error:
                problems.append(f"reward function {function.name}: {error}")
        if problems:
            raise DataError("\n".join(problems))
        return missing

    def take(self, function: RewardFunction) -> Worker:
        """A worker of this function that is ready; an idle one, or a new one."""
        with self._lock:
            if self._idle[function.title]:
                return self._idle[function.title].pop()
        worker = Worker(function, self.settings, self.folder)
        try:
            worker.ready()
        except NotUsable as error:
            worker.close()
            raise StageError(f"reward function {function.name} started before and does not now: {error}") from None
        return worker

    def give_back(self, worker: Worker) -> None:
        """Keeps a worker for the next batch."""
        with self._lock:
            self._idle[worker.function.title].append(worker)

    def count_lost(self, function: RewardFunction, reason: str) -> None:
        """Counts a hang or crash.

        Raises:
            StageError: there were too many.
        """
        with self._lock:
            self._lost += 1
            lost = self._lost
        if lost > self.settings.max_lost_workers:
            raise StageError(
                f"reward functions hung or crashed {lost} times, last {function.name}: {reason}; "
                "mend the function, or raise reward.max_lost_workers"
            )

    def dismiss(self, function: RewardFunction) -> None:
        """Ends this function's idle workers."""
        with self._lock:
            workers, self._idle[function.title] = self._idle[function.title], []
        for worker in workers:
            worker.close()


@contextlib.contextmanager
def crew(settings: RewardSettings, folder: Path) -> Iterator[Crew]:
    """Workers for a while; all of them have ended afterwards."""
    found = Crew(settings, folder)
    with unreadable():
        try:
            yield found
        finally:
            for function in settings.functions:
                found.dismiss(function)


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
        for function, scores in zip(functions, results, strict=True):
            tasks = [pool.submit(work, function, scores, *batch) for batch in batches]
            try:
                for task in tasks:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
            crew.dismiss(function)
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
    inputs = rows.select([]) if rows.num_rows == 0 else _inputs(rows, crew.parameters[function.title])
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
    worker = crew.take(function)
    values, errors = worker.score(_encoded(inputs), inputs.num_rows, seconds)
    crew.give_back(worker)
    return [crew.settings.error_score if row in errors else value for row, value in enumerate(values)], errors


def _inputs(rows: "pa.Table", parameters: dict[str, str]) -> "pa.Table":
    import pyarrow as pa

    return pa.table({name: rows.column(column) for name, column in parameters.items()})


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

"""The worker processes of one stage: started as needed, lent to whoever scores a batch, counted when lost."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from components.common.errors import DataError, StageError
from components.reward.config import RewardFunction, RewardSettings
from components.reward.process import Worker, WorkerLost
from components.reward.resolve import NotUsable, bind
from components.reward.sandbox import unreadable


class Crew:
    """The workers of a stage; every function is checked before anything is scored."""

    def __init__(self, settings: RewardSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.parameters: dict[str, dict[str, str]] = {}
        """Function → its parameters and the columns they get."""
        self._idle: dict[str, list[Worker]] = {function.title: [] for function in settings.functions}
        self._lent: set[Worker] = set()
        self._lock = threading.Lock()
        self._lost = 0
        self._stopped = False

    def check(self, data: list[str]) -> list[str]:
        """Loads every function and binds its parameters to columns; gives what of the confinement could not be had.

        Raises:
            DataError: a function is missing or cannot be called with the columns `data`; every problem at once.
        """
        problems: list[str] = []
        missing: list[str] = []
        for function in self.settings.functions:
            self._idle[function.title].append(Worker(function, self.settings, self.folder))
        for function in self.settings.functions:
            (worker,) = self._idle[function.title]
            try:
                wanted, missing = worker.ready()
                self.parameters[function.title] = bind(wanted, data, function.columns, function.arguments)
            except NotUsable as error:
                problems.append(f"reward function {function.name}: {error}")
        if problems:
            raise DataError("\n".join(problems))
        return missing

    @contextlib.contextmanager
    def worker(self, function: RewardFunction) -> Iterator[Worker]:
        """Lends a worker of this function; one that is lost meanwhile does not come back.

        Raises:
            StageError: the stage is being stopped, or the function does not start any more.
        """
        worker = self._take(function)
        try:
            yield worker
        except WorkerLost:
            with self._lock:
                self._lent.discard(worker)
            raise
        with self._lock:
            self._lent.discard(worker)
            self._idle[function.title].append(worker)

    def _take(self, function: RewardFunction) -> Worker:
        with self._lock:
            if self._stopped:
                raise StageError("scoring was stopped")
            if self._idle[function.title]:
                worker = self._idle[function.title].pop()
                self._lent.add(worker)
                return worker
            worker = Worker(function, self.settings, self.folder)
            self._lent.add(worker)
        try:
            worker.ready()
        except NotUsable as error:
            raise StageError(f"reward function {function.name} started before and does not now: {error}") from None
        return worker

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

    def stop(self) -> None:
        """Ends all workers, busy ones too; no more are lent."""
        with self._lock:
            self._stopped = True
            for worker in self._lent:
                worker.kill()
        for function in self.settings.functions:
            self.dismiss(function)


@contextlib.contextmanager
def crew(settings: RewardSettings, folder: Path) -> Iterator[Crew]:
    """Workers for a while; all of them have ended afterwards."""
    found = Crew(settings, folder)
    with unreadable():
        try:
            yield found
        finally:
            found.stop()

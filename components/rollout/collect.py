"""Drawing a job's groups: tells how far it is and saves what is finished, also when it is stopped."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from components.common.errors import HealthError, StageError, StoreError
from components.rollout.config import RolloutSettings
from components.rollout.plan import Group
from components.rollout.resume import Key, Sample, Saved
from components.rollout.sampler import Completion, Sampler

log = logging.getLogger("grpo")

Progress = Callable[..., None]


@dataclass
class Collection:
    """Groups and the samples drawn for them so far."""

    groups: Sequence[Group]
    finished: dict[Key, list[Sample]]
    saved: Saved
    num_tokens: int = 0
    num_drawn: int = 0
    _open: dict[Key, dict[int, Sample]] = field(default_factory=dict)
    _unsaved: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_key = {group.key: group for group in self.groups}
        self._keys = {id(request): group.key for group in self.groups for request in group.requests}

    @property
    def pending(self) -> list[Group]:
        """Groups that are not finished, in the order they are to be drawn."""
        return [group for group in self.groups if group.key not in self.finished]

    def add(self, completion: Completion) -> None:
        """Takes a completion in; a group is finished with its last one."""
        import numpy as np

        key = self._keys[id(completion.request)]
        sample = Sample(
            np.asarray(completion.completion_ids, np.int32), np.asarray(completion.logprobs, np.float32),
            completion.finish_reason, completion.error,
        )  # fmt: skip
        members = self._open.setdefault(key, {})
        members[completion.request.sample_index] = sample
        self.num_tokens += len(sample.completion_ids)
        self.num_drawn += 1
        if len(members) == len(self._by_key[key].requests):
            self.finished[key] = [members[index] for index in range(len(members))]
            if not any(sample.failed for sample in self.finished[key]):  # a restart tries the others again
                self._unsaved.append(key)
            del self._open[key]

    def save(self) -> None:
        """Puts finished groups that are not in the store yet into it; a store that refuses gets them the next time."""
        if not self._unsaved:
            return
        try:
            self.saved.save([(self._by_key[key], self.finished[key]) for key in self._unsaved])
        except StoreError as problem:  # what is saved only spares work; the rollout itself goes on
            log.warning("%d finished groups could not be saved: %s", len(self._unsaved), problem)
        else:
            self._unsaved.clear()


def draw_all(collection: Collection, sampler: Sampler, settings: RolloutSettings, progress: Progress) -> None:
    """Draws every pending group. On SIGTERM, Ctrl-C or a failure the finished groups are saved first.

    Raises:
        StageError: the process was told to end.
    """
    requests = [request for group in collection.pending for request in group.requests]
    started = told = saved = time.monotonic()
    with _Termination() as termination:
        try:
            batches = iter(sampler.sample(requests))
            while (batch := termination.interruptible(batches)) is not None:
                for completion in batch:
                    collection.add(completion)
                termination.check()
                now = time.monotonic()
                if now - saved >= settings.save_every_seconds:
                    collection.save()
                    saved = time.monotonic()
                if now - told >= settings.progress_every_seconds:
                    told = now
                    _tell(collection, sampler, len(requests), now - started, progress)
        except BaseException:
            collection.save()
            raise


def _tell(collection: Collection, sampler: Sampler, total: int, seconds: float, progress: Progress) -> None:
    drawn, tokens = collection.num_drawn, collection.num_tokens + sampler.tokens_in_flight()
    left = {"seconds_left": (total - drawn) * seconds / drawn} if drawn else {}  # unknown before the first
    progress(
        drawn, total, tokens_per_second=tokens / seconds, running=sampler.load.running, waiting=sampler.load.waiting,
        **left,
    )  # fmt: skip


def check_failures(collection: Collection, settings: RolloutSettings) -> None:
    """Before anything is published. Raises HealthError when too many samples could not be drawn.

    The groups that could be are saved first: a restart draws the others.
    """
    samples = [sample for group in collection.groups for sample in collection.finished[group.key]]
    failed = [sample for sample in samples if sample.failed]
    if not failed:
        return
    message = f"{len(failed)} of {len(samples)} samples could not be drawn; the first: {failed[0].error}"
    if len(failed) > settings.max_failed_share * len(samples):
        collection.save()
        raise HealthError(f"{message}; rollout.max_failed_share = {settings.max_failed_share} allows fewer")
    log.warning("%s; they are recorded as failed", message)


class _Termination:
    """Turns SIGTERM into a StageError: at once while the engine works, else when what is being noted is noted.

    Only the main thread may catch signals; in another one this does nothing.
    """

    def __enter__(self) -> Self:
        self._told = self._engine_works = False
        self._catches = threading.current_thread() is threading.main_thread()
        if self._catches:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._catches:
            signal.signal(signal.SIGTERM, self._before)

    def interruptible(self, batches: Iterator[Sequence[Completion]]) -> Sequence[Completion] | None:
        """The engine's next completions; None when there are no more."""
        self._engine_works = True
        try:
            return next(batches, None)
        finally:
            self._engine_works = False

    def check(self) -> None:
        """Raises if the process was told to end."""
        if self._told:
            raise StageError("told to end (SIGTERM): finished groups are saved, the next start goes on with the others")

    def _tell(self, *_: object) -> None:
        self._told = True
        if self._engine_works:
            self._engine_works = False  # a second signal must not disturb the saving
            self.check()

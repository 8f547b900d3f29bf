"""Running the same work over many items on all cores."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bounded_map(work: Callable[[A], B], items: Iterable[A], threads: int = 0) -> Iterator[B]:
    """`map` on threads, in order, with at most two items a thread under way or waiting: memory stays bounded.

    `threads`: 0 means a thread a core, 1 none at all.
    """
    threads = threads or cpu_count()
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()


def in_parallel(threads: int, work: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Results of `work` on each item, of at most `threads` at once; for work that waits more than it computes."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))

"""Where a task's log goes: the pod's stdout, or on a local run a file of its own that errors name."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("grpo")
LINE = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")


@contextmanager
def task_log(path: Path | None) -> Iterator[None]:
    """Sends the log lines to `path`, and with them whatever this process and its children print; none: to stdout."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if path is None:
        with _handler(logging.StreamHandler(sys.stdout)):
            yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file, _handler(logging.FileHandler(path)), _redirected(file.fileno()):
        yield


@contextmanager
def _handler(handler: logging.Handler) -> Iterator[None]:
    handler.setFormatter(LINE)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.flush()
        if isinstance(handler, logging.FileHandler):
            handler.close()


@contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Standard output and error of the process, children included, into an open file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)

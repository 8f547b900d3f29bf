"""The stage's handle on a worker: starts it, sends it batches, and kills it when it hangs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from components.reward.config import RewardFunction, RewardSettings
from components.reward.frames import MAX_REPLY_BYTES, receive, send, send_json
from components.reward.resolve import NotUsable, Parameters
from components.reward.sandbox import environment, package_paths, readable_paths

START_SECONDS = 120.0
"""Longest a worker may take to start: its function's module may import much."""
STATUS_SECONDS = 10.0
"""Longest wait for the exit status of a worker that is gone: the processes around it end after it, on a busy machine
late."""
LOG_TAIL_BYTES = 2000


class WorkerLost(Exception):
    """A worker hung and was killed, or died; the message says which."""


class Worker:
    """One reward function in a process of its own.

    `start` returns at once, so that several workers can start together; `ready` waits.
    """

    def __init__(self, function: RewardFunction, settings: RewardSettings, folder: Path) -> None:
        self.function = function
        self.scratch = Path(tempfile.mkdtemp(prefix="worker-", dir=folder))
        self.log = folder / f"{self.scratch.name}.log"
        readable = readable_paths([*package_paths(function.name), *settings.read_paths])
        limits = {
            "scratch": str(self.scratch), "memory_gb": settings.memory_gb,
            "network": settings.allow_network, "readable": readable,
        }  # fmt: skip
        self.connection, theirs = socket.socketpair()
        with theirs, self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "components.reward.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment(self.scratch), cwd=self.scratch,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        fields = {"name", "source", "arguments", "messages"}
        send_json(self.connection, function.model_dump(mode="json", include=fields) | {"limits": limits})

    def ready(self) -> tuple[Parameters, list[str]]:
        """Waits until the function is loaded: the parameters it wants, and what of the confinement could not be had.

        Raises:
            NotUsable: the function cannot be used.
        """
        try:
            reply = self._reply(START_SECONDS)
        except WorkerLost as error:
            raise NotUsable(f"{error} while its module was imported{self._log_tail()}") from None
        if "refused" in reply:
            raise NotUsable(reply["refused"])
        wanted = {
            name: tuple(value) if isinstance(value, list) else value for name, value in reply["parameters"].items()
        }
        return Parameters(**wanted), reply["missing"]

    def score(self, batch: bytes, count: int, seconds: float) -> tuple[list[float | None], dict[int, str]]:
        """Scores `count` completions within `seconds`: their scores, and the errors by position.

        Raises:
            WorkerLost: it did not answer in time, died, or answered nonsense; it is gone now.
        """
        self.connection.settimeout(seconds)
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: reading tells
            send(self.connection, batch)
        reply = self._reply(seconds - (time.monotonic() - started))
        try:
            scores = [None if score is None else float(score) for score in reply["scores"]]
            errors = {int(row): str(text) for row, text in reply["errors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):  # the function has forged a reply
            scores, errors = [], {}
        if len(scores) != count:
            self.close()
            raise WorkerLost("its process answered out of turn")
        return scores, errors

    def kill(self) -> None:
        """Ends the worker and everything it started; whoever waits for its reply learns that it is lost."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def close(self) -> None:
        """Ends the worker and forgets it."""
        self.kill()
        self.process.wait()
        self.connection.close()

    def _reply(self, seconds: float) -> dict[str, Any]:
        try:
            data = receive(self.connection, deadline=time.monotonic() + seconds, limit=MAX_REPLY_BYTES)
            if data is not None:
                return json.loads(data)
            reason = "its process died"
        except TimeoutError:
            reason = "it hung, so its process was killed"
        except (ValueError, RecursionError):
            reason = "its process answered nonsense"
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):  # its own exit status, not that of our kill
                reason += f" ({_status(self.process.wait(STATUS_SECONDS))})"
        self.close()
        raise WorkerLost(reason)

    def _log_tail(self) -> str:
        text = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return f"; it wrote:\n{text}" if text else ""


def _status(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number in signal.valid_signals():
        return f"signal {signal.Signals(number).name}"
    return f"exit status {code}"

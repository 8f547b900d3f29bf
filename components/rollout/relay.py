"""Running the stage in another Python environment: vLLM and Kubeflow Pipelines want different protobuf releases."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from components.common.errors import SettingsError, StageError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def runs_elsewhere(python: str | None) -> bool:
    """Whether `python` names another interpreter than the present one; links count as names of their own, as they
    are what tells virtual environments apart."""
    return python is not None and os.path.abspath(python) != os.path.abspath(sys.executable)


def run_elsewhere(python: str, module: str, arguments: Mapping[str, object]) -> None:
    """Runs `python -m module` with the arguments, its log in ours, and ends it when we end.

    Raises:
        SettingsError: there is no such interpreter.
        StageError: the stage failed there; the message is its own.
    """
    if not os.access(python, os.X_OK):
        raise SettingsError(f"rollout.python = {python!r} is not an interpreter: install that environment or unset it")
    command = [os.path.abspath(python), "-m", module]
    for name, value in arguments.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, text=True, bufsize=1,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent,
    )  # fmt: skip
    tail = _follow(child)
    if child.returncode != 0:
        head, lines = f"python -m {module}: ", list(tail)
        starts = [number for number, line in enumerate(lines) if line.startswith(head)]
        why = "\n".join(lines[starts[-1] :]).removeprefix(head) if starts else "\n".join(lines)
        raise StageError(f"{module} in {python} ended with status {child.returncode}: {why}")


def _follow(child: subprocess.Popen) -> deque[str]:
    """Prints the child's lines as they come and passes SIGTERM on to it; gives the last lines."""
    tail: deque[str] = deque(maxlen=30)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate()) if main else None
    try:
        for line in child.stdout:
            tail.append(line.rstrip("\n"))
            print(line, end="", flush=True)
        child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    return tail


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

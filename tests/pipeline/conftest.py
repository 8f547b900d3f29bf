"""What the pipeline's tests share."""

import functools
import inspect

import pytest


@pytest.fixture(autouse=True)
def stacks_without_source_lines(monkeypatch):
    """KFP asks for the whole call stack at every setter of a task, to name the caller in an error.

    With source lines that looks through every loaded module: minutes, where another test has imported torch.
    """
    monkeypatch.setattr(inspect, "stack", functools.partial(inspect.stack, 0))

"""The story fixture of evaluate, continued: publish runs on what the real evaluate stage wrote."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

_story = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "evaluate" / "story.py")))


@pytest.fixture
def make_story(tmp_path):
    return lambda **options: _story.Story(tmp_path, **options)


@pytest.fixture(scope="session")
def sample():
    return _story.sample

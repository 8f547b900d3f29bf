"""The story fixture, and the names of its parts."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

story_module = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("story.py"))))


@pytest.fixture
def make_story(tmp_path):
    return lambda **options: story_module.Story(tmp_path, **options)


@pytest.fixture
def story(make_story):
    return make_story()


@pytest.fixture(scope="session")
def sample():
    return story_module.sample

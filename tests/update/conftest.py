"""A tiny policy and a scored rollout of it, made once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine_case import Case, save_tiny_model


@pytest.fixture(scope="session")
def engine_model(tmp_path_factory) -> Path:
    """Folder of a tiny policy; not to be changed."""
    return save_tiny_model(tmp_path_factory.mktemp("engine-model"))


@pytest.fixture
def case(tmp_path) -> Case:
    """A fine-tune on one process, with an optimizer whose step is nearly linear in the gradient."""
    return Case(
        tmp_path / "case", settings={"zero_stage": 0, "num_threads": 1, "learning_rate": 1e-2, "adam_epsilon": 1e-2}
    )

"""`grpo init`: what it writes is valid and complete."""

import pytest

from components.common.errors import SettingsError
from pipeline.scaffold import write_start
from pipeline.settings import load


def test_the_written_settings_load_and_carry_the_reward_function(tmp_path):
    paths = write_start(tmp_path / "mine")
    assert [path.name for path in paths] == ["settings.toml", "reward.py", "prompts.jsonl"]
    settings = load(tmp_path / "mine" / "settings.toml")
    assert settings.dataset.source == str(tmp_path / "mine" / "prompts.jsonl")
    assert "def reward(" in settings.reward.functions[0].source


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(SettingsError, match="not empty"):
        write_start(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_a_missing_reward_file_is_named(tmp_path):
    write_start(tmp_path / "mine")
    (tmp_path / "mine" / "reward.py").unlink()
    with pytest.raises(SettingsError, match=r"reward\.py.*No such file"):
        load(tmp_path / "mine" / "settings.toml")


def test_overrides_reach_every_section(tmp_path):
    write_start(tmp_path / "mine")
    settings = load(tmp_path / "mine" / "settings.toml", ["update.learning_rate=2e-6", "cluster.rollout.gpus=4"])
    assert settings.update.learning_rate == 2e-6
    assert settings.cluster.rollout.gpus == 4 and settings.cluster.rollout.memory == "64Gi"

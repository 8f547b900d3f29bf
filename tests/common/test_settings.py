"""Settings: unknown names, nearest names, all problems at once, overrides."""

from typing import Literal

import pytest
from pydantic import Field

from components.common.errors import SettingsError
from components.common.settings import (
    RunContext,
    Settings,
    apply_overrides,
    dump_stage,
    load_stage,
    read_toml,
    validate,
)


class Inner(Settings):
    learning_rate: float = 1e-6
    loss_type: Literal["grpo", "dapo"] = "dapo"


class Entry(Settings):
    weight: float = 1.0


class Outer(Settings):
    name: str
    update: Inner = Inner()
    entries: tuple[Entry, ...] = Field(default=(Entry(),), min_length=1)


def test_a_misspelt_setting_names_the_nearest():
    with pytest.raises(SettingsError, match=r"learning_rte is not a setting; did you mean update\.learning_rate\?"):
        validate(Outer, {"name": "x", "update": {"learning_rte": 1}})


def test_a_setting_in_the_wrong_section_is_found_by_its_name():
    with pytest.raises(SettingsError, match=r"did you mean update\.learning_rate\?"):
        validate(Outer, {"name": "x", "learning_rate": 1e-6})


def test_a_misspelt_setting_in_a_list_names_the_nearest_and_is_the_only_problem():
    with pytest.raises(SettingsError) as error:
        validate(Outer, {"name": "x", "entries": [{"wieght": 2}]})
    assert str(error.value).splitlines() == [
        "settings: 1 problem", "  entries.0.wieght is not a setting; did you mean entries.weight?",
    ]  # fmt: skip
    with pytest.raises(SettingsError, match="entries: Tuple should have at least 1 item"):
        validate(Outer, {"name": "x", "entries": []})


def test_a_date_is_no_text(tmp_path):
    (tmp_path / "settings.toml").write_text("name = 2024-01-01\n")
    values = apply_overrides(read_toml(tmp_path / "settings.toml"), ["update.learning_rate=2e-6"])
    with pytest.raises(SettingsError, match=r"name: .*got the date or time 2024-01-01: put it in quotes"):
        validate(Outer, values)


def test_overrides_leave_the_values_they_are_laid_over_alone():
    values = {"update": {"learning_rate": 1.0}}
    assert apply_overrides(values, ["update.learning_rate=2.0"]) == {"update": {"learning_rate": 2.0}}
    assert values == {"update": {"learning_rate": 1.0}}


def test_all_problems_come_at_once():
    with pytest.raises(SettingsError) as error:
        validate(Outer, {"update": {"loss_type": "ppo", "learning_rate": "fast"}})
    text = str(error.value)
    assert text.startswith("settings: 3 problems")
    assert "name is missing" in text and "update.loss_type" in text and "got 'fast'" in text


def test_a_file_that_is_not_toml(tmp_path):
    (tmp_path / "settings.toml").write_text("name = [1\nseed = 2\n")
    with pytest.raises(SettingsError, match=r"settings\.toml is not TOML: .*line"):
        read_toml(tmp_path / "settings.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="is not TOML"):
        read_toml(tmp_path / "binary.toml")
    with pytest.raises(SettingsError, match="grpo init"):
        read_toml(tmp_path / "missing.toml")


def test_overrides_are_toml_values_or_bare_words():
    values = apply_overrides(
        {"update": {"learning_rate": 1e-6}},
        ["update.learning_rate=2e-6", "model=Qwen/Qwen3-0.6B", "update.flags=[1, 2]", 'name="a b"', "on=true"],
    )
    assert values == {
        "update": {"learning_rate": 2e-6, "flags": [1, 2]}, "model": "Qwen/Qwen3-0.6B", "name": "a b", "on": True,
    }  # fmt: skip


@pytest.mark.parametrize("override", ["update.learning_rate", "=3", "name.inner=3"])
def test_overrides_that_make_no_sense_are_refused(override):
    with pytest.raises(SettingsError):
        apply_overrides({"name": "x"}, [override])


def test_stage_settings_survive_the_journey(tmp_path):
    context = RunContext(fine_tune="f", run="r", store="file:///tmp/x", seed=3, iterations=2)
    text = dump_stage(context, Inner(learning_rate=3e-5))
    assert load_stage(Inner, text) == (context, Inner(learning_rate=3e-5))
    (tmp_path / "settings.json").write_text(text)
    assert load_stage(Inner, str(tmp_path / "settings.json")) == (context, Inner(learning_rate=3e-5))
    for broken in ("{", '{"run": {}}', "[]", str(tmp_path / "none.json")):
        with pytest.raises(SettingsError):
            load_stage(Inner, broken)

"""The form: every setting reaches Kubeflow as a typed parameter and comes back as it was."""

import json

import pytest

from components.common.settings import validate
from components.configure.config import RunSettings
from components.configure.form import form_fields, merge, nest

VALUES = {
    "fine_tune": "f",
    "model": "m",
    "dataset": {"source": "gsm8k"},
    "reward": {"functions": [{"name": "numeric_match"}]},
}


@pytest.fixture
def settings():
    return validate(RunSettings, VALUES)


def test_names_are_unique_and_kinds_are_what_kfp_takes():
    fields = list(form_fields(RunSettings))
    assert len({field.name for field in fields}) == len(fields) > 60
    assert {field.kind for field in fields} <= {str, int, float, bool, list, dict}
    assert all(field.description for field in fields)


def test_what_shapes_the_graph_is_not_asked():
    assert not {"iterations", "shards", "staleness"} & {field.name for field in form_fields(RunSettings)}


def test_the_defaults_come_back_as_the_settings_they_came_from(settings):
    plain = settings.model_dump(mode="json")
    form = {field.dotted: field.default(plain) for field in form_fields(RunSettings)}
    assert "null" not in json.dumps(form)  # KFP refuses null
    assert validate(RunSettings, merge(plain, nest(form, RunSettings))) == settings


def test_numbers_that_kfp_made_floats_are_whole_again(settings):
    plain = settings.model_dump(mode="json")
    changed = validate(RunSettings, merge(plain, nest({"evaluate.k_values": [1.0, 2.0]}, RunSettings)))
    assert changed.evaluate.k_values == (1, 2)


def test_a_blank_unsets_an_optional_setting(settings):
    plain = merge(settings.model_dump(mode="json"), {"rollout": {"top_k": 5}})
    assert validate(RunSettings, plain).rollout.top_k == 5
    assert validate(RunSettings, merge(plain, nest({"rollout.top_k": ""}, RunSettings))).rollout.top_k is None
    assert validate(RunSettings, merge(plain, nest({"rollout.top_k": "7"}, RunSettings))).rollout.top_k == 7


def test_enumerations_have_choices():
    choices = {field.name: field.choices for field in form_fields(RunSettings) if field.choices}
    assert "dapo" in choices["update_loss_type"] and choices["start_from"] == ("base", "latest", "champion")

"""The form: every setting reaches Kubeflow as a typed parameter and comes back as it was."""

import json

import pytest

from components.common.settings import validate
from components.configure.config import RunSettings
from components.configure.form import form_fields, overlay

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


def as_kfp_hands_it_over(value):
    """Protobuf's Struct has one kind of number; text, numbers and truth values of a form have their own types."""
    if isinstance(value, dict):
        return {name: as_kfp_hands_it_over(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_kfp_hands_it_over(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def form_of(plain):
    form = {field: field.default(plain) for field in form_fields(RunSettings)}
    assert "null" not in json.dumps(list(form.values()))  # KFP refuses null
    return {
        field.dotted: as_kfp_hands_it_over(value) if field.kind in (list, dict) else value
        for field, value in form.items()
    }


def test_the_defaults_come_back_as_the_settings_they_came_from(settings):
    plain = settings.model_dump(mode="json")
    assert validate(RunSettings, overlay(plain, form_of(plain), RunSettings)) == settings


ARGUMENTS = {"ngram": 2, "share": 1.0, "deep": {"sizes": [1, 2.0, 3]}, "unset": None, "on": True}


def test_whole_numbers_of_arguments_stay_what_they_were():
    functions = [{"name": "repetition_penalty", "weight": 2, "arguments": ARGUMENTS}]
    settings = validate(RunSettings, VALUES | {"reward": {"functions": functions}})
    plain = settings.model_dump(mode="json")
    found = validate(RunSettings, overlay(plain, form_of(plain), RunSettings))
    assert repr(found) == repr(settings)  # 2 == 2.0, so that equality would not tell


def test_whole_numbers_that_the_form_changes_are_integers_unless_a_float_stood_there():
    functions = [{"name": "repetition_penalty", "arguments": ARGUMENTS}]
    plain = validate(RunSettings, VALUES | {"reward": {"functions": functions}}).model_dump(mode="json")
    changed = {"ngram": 4.0, "share": 2.0, "deep": {"sizes": [5.0, 6.0, 7.5, 8.0]}, "new": 9.0}
    form = {
        "reward.functions": [{"name": "repetition_penalty", "arguments": changed}],
        "dataset.chat_template_arguments": {"budget": 64.0},
    }
    found = validate(RunSettings, overlay(plain, form, RunSettings))
    wanted = {"ngram": 4, "share": 2.0, "deep": {"sizes": [5, 6.0, 7.5, 8]}, "new": 9}
    assert repr(found.reward.functions[0].arguments) == repr(wanted)
    assert repr(found.dataset.chat_template_arguments) == "{'budget': 64}"


def test_what_the_form_takes_out_of_a_dictionary_is_gone(settings):
    plain = settings.model_dump(mode="json")
    plain["dataset"]["chat_template_arguments"] = {"enable_thinking": False}
    found = validate(RunSettings, overlay(plain, {"dataset.chat_template_arguments": {}}, RunSettings))
    assert found.dataset.chat_template_arguments == {}


def test_numbers_that_kfp_made_floats_are_whole_again(settings):
    plain = settings.model_dump(mode="json")
    changed = validate(RunSettings, overlay(plain, {"evaluate.k_values": [1.0, 2.0]}, RunSettings))
    assert changed.evaluate.k_values == (1, 2)


def test_a_blank_unsets_an_optional_setting(settings):
    plain = settings.model_dump(mode="json")
    plain["rollout"]["top_k"] = 5
    assert validate(RunSettings, plain).rollout.top_k == 5
    for text, wanted in (("", None), ("7", 7), ("5", 5)):
        assert validate(RunSettings, overlay(plain, {"rollout.top_k": text}, RunSettings)).rollout.top_k == wanted


def test_enumerations_have_choices():
    choices = {field.name: field.choices for field in form_fields(RunSettings) if field.choices}
    assert "dapo" in choices["update_loss_type"] and choices["start_from"] == ("base", "latest", "champion")

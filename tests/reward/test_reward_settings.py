"""Settings of reward functions: names, labels, and files that travel with them."""

import pytest

from components.common.errors import SettingsError
from components.common.settings import RunContext, dump_stage, load_stage, validate
from components.reward.config import RewardFunction, RewardSettings
from components.reward.names import BUILT_IN
from components.reward.resolve import load, parameters


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_is_there_and_says_what_it_wants(name):
    wanted = parameters(load(name, None))
    assert wanted.required[0] in ("completions", "completion_ids")
    assert not wanted.any


REFUSED = {
    "numeric_macth": "no built-in reward function of that name; did you mean numeric_match?",
    "my/rewards.txt:f": "want path/to/file.py:function or package.module:function",
    "mine.py:": "want path/to/file.py:function or package.module:function",
    "package.module:not a name": "want path/to/file.py:function or package.module:function",
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_of_no_form_are_refused(name):
    with pytest.raises(SettingsError) as caught:
        validate(RewardSettings, {"functions": [{"name": name}]})
    assert REFUSED[name] in str(caught.value)
    assert "functions.0.name" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": []}, "at least 1 item"),
        ({"functions": [{"name": "numeric_match", "weigth": 1}]}, "functions.0.weigth is not a setting"),
        ({"functions": [{"name": "numeric_match", "weight": float("nan")}]}, "finite number"),
        ({"functions": [{"name": "numeric_match", "weight": 0}]}, "every reward function has weight 0"),
        ({"functions": [{"name": "numeric_match"}] * 2}, "two reward functions are called numeric_match"),
        ({"timeout_seconds": 100}, "batch_timeout_seconds must be at least timeout_seconds (100), got 60"),
        ({"functions": [{"name": "numeric_match", "source": "x = 1"}]}, "source goes with a name of the form file.py"),
        ({"functions": [{"name": "a.py:f", "source": "def g(): pass"}]}, "a.py does not define f; there are g"),
        ({"functions": [{"name": "a.py:f", "source": "def f(:"}]}, "a.py is not Python: line 1: invalid syntax"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(SettingsError) as caught:
        validate(RewardSettings, settings)
    assert message in str(caught.value)


def test_the_same_function_may_count_twice_under_two_labels():
    functions = [{"name": "regex_format", "label": name, "arguments": {"pattern": name}} for name in ("a", "b")]
    assert [f.title for f in validate(RewardSettings, {"functions": functions}).functions] == ["a", "b"]


def test_files_travel_with_the_settings(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions): return [1.0] * len(completions)\n")
    settings = RewardSettings(functions=[{"name": "mine.py:f"}, {"name": "numeric_match"}]).embedded(tmp_path)
    assert settings.functions[0].source == (tmp_path / "mine.py").read_text()
    assert settings.functions[1].source is None
    (tmp_path / "mine.py").unlink()
    assert settings.embedded(tmp_path) == settings
    context = RunContext(fine_tune="t", run="r", store="file:///tmp", seed=0, iterations=1)
    assert load_stage(RewardSettings, dump_stage(context, settings))[1] == settings


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "No such file"),
        (b"def g(): pass", "does not define f; there are g"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_files_that_cannot_travel_are_refused(source, message, tmp_path):
    if source is not None:
        (tmp_path / "mine.py").write_bytes(source)
    with pytest.raises(SettingsError, match=message):
        RewardSettings(functions=[RewardFunction(name="mine.py:f")]).embedded(tmp_path)


@pytest.mark.parametrize(
    "source",
    ["from x import f", "import x as f", "f = lambda completions: []", "async def f(): pass", "class f: pass",
     "try:\n    from fast import f\nexcept ImportError:\n    def f(): pass", "from x import *", "f: object = print"],
)  # fmt: skip
def test_every_way_to_define_a_function_is_seen(source):
    assert RewardFunction(name="mine.py:f", source=source).source == source

"""The arithmetic recipe: problems, teacher, tokenizer and the model it starts from."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from components.reward.functions.matching import numeric_match
from pipeline.settings import load

RECIPE = Path(__file__).parents[2] / "recipes" / "arithmetic"
SETTINGS = RECIPE / "settings.toml"


@pytest.fixture(scope="module")
def recipe():
    """The recipe's `prepare.py` as a module."""
    spec = importlib.util.spec_from_file_location("arithmetic_prepare", RECIPE / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(folder, *, seed=0):
    command = [sys.executable, str(RECIPE / "prepare.py"), "--seed", str(seed), "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the recipe starts from, and what making it printed."""
    folder = tmp_path_factory.mktemp("arithmetic") / "build"
    result = prepare(folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_model_starts_between_a_fifth_and_a_half(prepared):
    folder, result = prepared
    share = float(result.stdout.partition("pass@1 ")[2].partition("%")[0])
    assert 20 <= share <= 45
    assert not list(folder.parent.glob(".preparing-*")) and result.stderr == ""


@pytest.mark.slow
def test_no_held_out_pair_is_trained_on_either_way_round(prepared):
    folder, _ = prepared
    train, held_out = (rows(folder / "problems" / f"{name}.jsonl") for name in ("train", "eval"))
    summands = [[tuple(map(int, row["prompt"].rstrip("=").split("+"))) for row in part] for part in (train, held_out)]
    seen, unseen = ({tuple(sorted(pair)) for pair in part} for part in summands)
    assert not seen & unseen and len(seen) + len(unseen) == 90 * 91 // 2
    assert len(train) == len(set(summands[0])) and len(held_out) == 256
    assert all(int(row["answer"]) == sum(pair) for row, pair in zip(train, summands[0], strict=True))


@pytest.mark.slow
def test_what_is_there_is_left_alone(prepared):
    folder, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = prepare(folder)
    assert again.returncode == 0 and "is ready" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_the_policy_is_a_plain_model_folder(prepared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert 80_000 < model.num_parameters() < 100_000 and len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("17+58=57→75")) == "17+58=57→75"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id


def test_the_same_seed_makes_the_same_bytes(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "NUM_STEPS", 3)
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        recipe.prepare(tmp_path / name, seed)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    different = {name for name in one if other[name] != one[name]}
    assert {path.name for path in different} == {"train.jsonl", "eval.jsonl", "model.safetensors"}


def test_another_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = prepare(tmp_path)
    assert result.returncode == 1 and "is not of this recipe's making" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("left", "right", "sums"),
    [
        (12, 34, {46}),
        (17, 58, {75, 65}),  # 7 + 8 carries
        (50, 60, {110, 10}),  # 5 + 6 carries
        (57, 48, {105, 95, 5}),  # both do; without the first carry there is no second
        (55, 45, {100, 90, 0}),
    ],
)
def test_the_teacher_errs_in_carries_alone(recipe, left, right, sums):
    chance = random.Random(0)
    assert {recipe.careless_sum(left, right, chance) for _ in range(300)} == sums


def test_the_teacher_forgets_four_carries_in_five(recipe):
    chance = random.Random(0)
    right = sum(recipe.careless_sum(17, 58, chance) == 75 for _ in range(4000))
    assert 0.17 < right / 4000 < 0.23  # 0.2, standard error 0.006


def test_a_completion_is_rewarded_for_its_last_number(recipe):
    functions = load(SETTINGS).reward.functions
    assert [function.name for function in functions] == ["numeric_match"]
    texts = [recipe.completion(75), "57→65", "57→", "75→57", "75", "→"]
    assert numeric_match(texts, [75] * 6, **functions[0].arguments) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_the_settings_fit_the_problems(recipe):
    settings = load(SETTINGS)
    longest = len(recipe.completion(2 * recipe.HIGHEST)) + 1
    assert settings.rollout.max_completion_length == longest == recipe.MAX_COMPLETION_LENGTH
    assert Path(settings.model) == RECIPE / "build" / "model"
    assert Path(settings.dataset.source) == RECIPE / "build" / "problems"
    train, _ = recipe.problems(0)
    assert settings.iterations * settings.rollout.num_prompts <= len(train)  # no problem is sampled twice

"""The dataset stage end to end: rows in, prompts out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common import champion
from components.common.champion import Champion
from components.common.errors import ArtifactNotFound, DataError, SettingsError
from components.common.settings import dump_stage
from components.dataset.config import DatasetSettings
from components.dataset.prompts import content_id
from components.dataset.stage import run

SUMS = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(3) for b in range(4)]


def ids_of(text: str) -> list[int]:
    alphabet = "0123456789+= abcdefghijklmnopqrstuvwxyz<>"
    return [3 + alphabet.index(character) for character in text]


def test_prompts_are_tokenised_once_with_the_policys_tokenizer(case, plain_tokenizer_folder, write_rows):
    case.run(case.policy(plain_tokenizer_folder), source=write_rows(SUMS), num_eval=3)
    train, held_out = case.table("train"), case.table("eval")
    assert (train.num_rows, held_out.num_rows) == (9, 3)
    rows = train.to_pylist() + held_out.to_pylist()
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in SUMS}
    for row in rows:
        assert row["prompt_ids"] == ids_of(row["prompt"])
        assert row["answer"] == int(row["prompt"][0]) + int(row["prompt"][2])
        assert row["prompt_id"] == content_id(row["prompt"], {"answer": row["answer"]})
    assert case.manifest.metrics["dataset/train_prompts"] == 9
    assert case.manifest.metrics["dataset/eval_max_prompt_length"] == 4


def test_weights_are_never_fetched(case, plain_tokenizer_folder, write_rows):
    policy = case.policy(plain_tokenizer_folder)  # whose weights are gone from the store
    case.run(policy, source=write_rows(SUMS), num_eval=3)
    assert "tokenizer_digest" in case.manifest.metadata


def test_a_chat_template_renders_system_prompt_and_question(case, tokenizer_folder, write_rows):
    case.run(
        case.policy(tokenizer_folder), source=write_rows(SUMS), num_eval=3, chat_template=True, system_prompt="add",
        prompt_template="what is {prompt}",
    )  # fmt: skip
    row = next(row for row in case.table("train").to_pylist())
    question = row["prompt"].removeprefix("<system>add<user>what is ").removesuffix("<a>")
    assert row["prompt"] == f"<system>add<user>what is {question}<a>"
    assert question in {row["prompt"] for row in SUMS}
    assert row["prompt_ids"] == ids_of(row["prompt"])


def test_the_messages_behind_a_rendered_prompt_travel_with_it(case, tokenizer_folder, write_rows):
    chat = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    rows = [{"prompt": chat}, *({"prompt": [{"role": "user", "content": f"{n}+2="}]} for n in range(3))]
    case.run(
        case.policy(tokenizer_folder), source=write_rows(rows), num_eval=1, chat_template=True, system_prompt="add",
        prompt_template="do {prompt}",
    )  # fmt: skip
    found = [row for split in ("train", "eval") for row in case.table(split).to_pylist()]
    messages = sorted((json.loads(row["prompt_messages"]) for row in found), key=len)
    system = {"role": "system", "content": "add"}
    assert messages[-1] == [system, *chat[:2], {"role": "user", "content": "do ?"}]
    assert sorted(one[1]["content"] for one in messages[:-1]) == ["do 0+2=", "do 1+2=", "do 2+2="]
    for row in found:
        told = "".join(f"<{one['role']}>{one['content']}" for one in json.loads(row["prompt_messages"]))
        assert row["prompt"] == told + "<a>"
    assert case.manifest.metadata["columns"] == []


def test_prompts_may_be_chat_messages(case, tokenizer_folder, write_rows):
    rows = [
        {"prompt": [{"role": "user", "content": "1+1="}, {"role": "a", "content": "2"}, {"role": "user", "content": c}]}
        for c in "abcdef"
    ]
    case.run(case.policy(tokenizer_folder), source=write_rows(rows), num_eval=1, chat_template=True)
    prompts = case.table("train").column("prompt").to_pylist() + case.table("eval").column("prompt").to_pylist()
    assert sorted(prompts) == [f"<user>1+1=<a>2<user>{c}<a>" for c in "abcdef"]


def test_the_same_data_has_the_same_digest(case, plain_tokenizer_folder, write_rows):
    policy = case.policy(plain_tokenizer_folder)
    case.run(policy, source=write_rows(SUMS), num_eval=3)
    first = case.manifest
    case.context = case.context.model_copy(update={"run": "two"})
    case.run(policy, source=write_rows(SUMS, "copy.jsonl"), num_eval=3)
    assert case.manifest.digest == first.digest
    assert case.manifest.metadata["dataset_digest"] == first.metadata["dataset_digest"]
    case.context = case.context.model_copy(update={"run": "three"})
    changed = [*SUMS[:-1], SUMS[-1] | {"answer": 99}]
    case.run(policy, source=write_rows(changed, "changed.jsonl"), num_eval=3)
    assert case.manifest.metadata["dataset_digest"] != first.metadata["dataset_digest"]


@pytest.mark.parametrize(("by", "news"), [("another", "unchanged"), ("one", "new")])
def test_data_is_unchanged_when_another_runs_champion_was_trained_on_it(
    case, plain_tokenizer_folder, write_rows, tmp_path, by, news
):
    """A run that is resumed after it had moved the pointer itself goes on as it had begun."""
    policy = case.policy(plain_tokenizer_folder)
    prompts = case.run(policy, source=write_rows([{"prompt": f"{n}"} for n in range(4)]), num_eval=1)
    told = {"manifest": "m", "digest": "d", "evaluation": "e", "evaluation_digest": "e", "iteration": 1, "metric": "m"}
    digest = prompts.metadata["dataset_digest"]
    champion.write(
        case.store, "test", Champion(run=by, value=1.0, accepted="now", dataset_digest=digest, **told)
    )  # fmt: skip
    settings = DatasetSettings(chat_template=False, source=str(tmp_path / "rows.jsonl"), num_eval=1)
    assert run(dump_stage(case.context, settings), policy, tmp_path / "prompts.json") == news


def test_given_ids_are_kept(case, plain_tokenizer_folder, write_rows):
    rows = [row | {"name": f"sum-{number}"} for number, row in enumerate(SUMS)]
    case.run(case.policy(plain_tokenizer_folder), source=write_rows(rows), num_eval=3, id_column="name")
    names = case.table("train").column("prompt_id").to_pylist() + case.table("eval").column("prompt_id").to_pylist()
    assert sorted(names) == sorted(row["name"] for row in rows)
    assert "name" not in case.table("train").column_names


def test_rows_that_repeat_are_kept_once(case, plain_tokenizer_folder, write_rows):
    case.run(case.policy(plain_tokenizer_folder), source=write_rows([*SUMS, SUMS[4], SUMS[4]]), num_eval=3)
    assert case.table("train").num_rows + case.table("eval").num_rows == len(SUMS)
    assert case.manifest.metadata["dropped"]["train"]["repeated"] == 2


def test_an_eval_prompt_is_never_trained_on(case, plain_tokenizer_folder, write_rows, tmp_path):
    write_rows(SUMS, "data/train.jsonl")
    write_rows([{"prompt": " 1+2=", "answer": 3}, {"prompt": "9+9=", "answer": 18}], "data/test.jsonl")
    case.run(case.policy(plain_tokenizer_folder), source=str(tmp_path / "data"), eval_split="test")
    assert case.table("eval").column("prompt").to_pylist() == [" 1+2=", "9+9="]
    assert "1+2=" not in case.table("train").column("prompt").to_pylist()
    assert case.manifest.metadata["dropped"]["train"] == {"also in eval": 1}


def test_long_prompts_are_dropped_and_counted(case, plain_tokenizer_folder, write_rows):
    rows = [*SUMS, {"prompt": "10+10+1=", "answer": 21}]
    case.run(case.policy(plain_tokenizer_folder), source=write_rows(rows), num_eval=3, max_prompt_length=7)
    assert case.table("train").num_rows + case.table("eval").num_rows == len(SUMS)
    assert case.manifest.metadata["dropped"]["train"]["longer than max_prompt_length = 7"] == 1


def test_a_prompt_beyond_the_context_is_dropped(case, plain_tokenizer_folder, write_rows):
    rows = [*SUMS, {"prompt": "1+1+1=", "answer": 3}]
    policy = case.policy(plain_tokenizer_folder, context=20)
    case.run(policy, source=write_rows(rows), num_eval=3, max_completion_length=15)
    reason = "beyond the context of 20 less 15 for the completion"
    assert case.manifest.metadata["dropped"]["train"][reason] == 1


REFUSED = {
    "no prompt column": (
        [{"question": "1+1=", "answer": 2}], {},
        "no column prompt; there are question, answer: name the one with the prompts in dataset.prompt_column",
    ),
    "empty prompts": (
        [*SUMS, {"prompt": "  ", "answer": 0}, {"prompt": None, "answer": 1}], {},
        r"2 of 14 rows have an empty prompt \(rows 12, 13, counted from 0\)",
    ),
    "only empty prompts": (
        [{"prompt": "", "answer": 0}, {"prompt": None, "answer": 1}], {"empty_prompts": "drop"},
        "no prompts left of 2 rows: 2 empty",
    ),
    "nothing left": (
        SUMS, {"max_prompt_length": 3},
        "no prompts left of 12 rows: 12 longer than max_prompt_length = 3",
    ),
    "duplicate ids": (
        [{"prompt": "1+1=", "id": "x"}, {"prompt": "1+2=", "id": "x"}, {"prompt": "2", "id": "y"}], {"id_column": "id"},
        "duplicate ids in column id: 'x' 2 times",
    ),
    "id missing in a row": (
        [{"prompt": "1+1=", "id": "x"}, {"prompt": "1+2="}], {"id_column": "id"},
        r"1 rows have no id \(row 1, counted from 0\)",
    ),
    "long prompt refused": (
        SUMS, {"long_prompts": "error", "max_prompt_length": 3},
        "12 prompts are longer than max_prompt_length = 3 tokens, the first is [0-9a-f]+ with 4",
    ),
    "beyond the context refused": (
        SUMS, {"long_prompts": "error", "max_completion_length": 61},
        "beyond the context of 64 less 61 for the completion",
    ),
    "prompts of another kind": (
        [{"prompt": 12}], {}, "prompt must be text or a list of messages with role and content, got int: 12",
    ),
    "a column name that is taken": (
        [{"prompt": "1+1=", "completion": "2"}], {}, "the column name completion is needed for what the model writes",
    ),
    "a column that is not there": (
        SUMS, {"columns": ("answers",)}, "dataset.columns names answers; there are prompt, answer",
    ),
    "too few to hold out": (SUMS, {"num_eval": 12}, "12 of 12 different prompts are to be held out"),
    "nothing at all": ([], {}, "no column prompt; there are none"),
    "messages without a template": (
        [{"prompt": [{"role": "user", "content": "1+1="}]}], {}, "set dataset.chat_template = true",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_data_is_refused(name, case, plain_tokenizer_folder, write_rows):
    rows, settings, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        case.run(case.policy(plain_tokenizer_folder), source=write_rows(rows), **{"num_eval": 1} | settings)


@pytest.mark.parametrize("id_column", [None, "name"])
def test_a_table_with_the_columns_and_no_rows(case, plain_tokenizer_folder, tmp_path, id_column):
    columns = {"prompt": pa.array([], pa.string()), "name": pa.array([], pa.string())}
    pq.write_table(pa.table(columns), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"train: no prompts left of 0 rows; check dataset.source"):
        case.run(case.policy(plain_tokenizer_folder), source=str(tmp_path / "none.parquet"), id_column=id_column)


def test_empty_prompts_may_be_dropped(case, plain_tokenizer_folder, write_rows):
    rows = [*SUMS, {"prompt": "", "answer": 0}]
    case.run(case.policy(plain_tokenizer_folder), source=write_rows(rows), num_eval=3, empty_prompts="drop")
    assert case.manifest.metadata["dropped"]["train"]["empty"] == 1


def test_a_policy_without_tokenizer_is_refused(case, plain_tokenizer_folder, write_rows):
    policy = case.policy(plain_tokenizer_folder, without=("tokenizer.json", "tokenizer_config.json"))
    with pytest.raises(DataError, match=r"no tokenizer: want tokenizer\.json, it has config\.json, model\.safetensors"):
        case.run(policy, source=write_rows(SUMS))


def test_a_broken_tokenizer_is_refused(case, tmp_path, write_rows):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer cannot be loaded"):
        case.run(case.policy(folder), source=write_rows(SUMS))


def test_a_tokenizer_without_chat_template_is_refused_where_one_is_wanted(case, plain_tokenizer_folder, write_rows):
    with pytest.raises(DataError, match=r"no chat template: set dataset\.chat_template = false"):
        case.run(case.policy(plain_tokenizer_folder), source=write_rows(SUMS), chat_template=True)


def test_a_template_that_refuses_a_prompt_is_named(case, make_tokenizer, write_rows):
    folder = make_tokenizer("{{ raise_exception('no system role here') }}")
    with pytest.raises(DataError, match="the chat template refuses a prompt: TemplateError: no system role here"):
        case.run(case.policy(folder), source=write_rows(SUMS), chat_template=True)


def test_a_completion_that_fills_the_context_is_refused(case, plain_tokenizer_folder, write_rows):
    policy = case.policy(plain_tokenizer_folder, context=32)
    with pytest.raises(SettingsError, match="leaves no room for a prompt in the model's context of 32 tokens"):
        case.run(policy, source=write_rows(SUMS), max_completion_length=32)


def test_a_missing_policy_manifest_is_refused(case, tmp_path, write_rows):
    with pytest.raises(ArtifactNotFound):
        case.run(tmp_path / "nowhere.json", source=write_rows(SUMS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_template": "no mark"}, "prompt_template must contain {prompt}"),
        ({"chat_template": False, "system_prompt": "be brief"}, "system_prompt needs chat_template"),
        ({"chat_template": False, "chat_template_arguments": {"x": 1}}, "chat_template_arguments needs"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    from components.common.settings import validate
    from components.dataset.config import DatasetSettings

    with pytest.raises(SettingsError, match=message):
        validate(DatasetSettings, {"source": "rows.jsonl"} | settings)

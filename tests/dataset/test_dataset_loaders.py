"""Where rows may come from: files, folders in the hub's and in `save_to_disk`'s format, S3, presets."""

import json
import os
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.errors import DataError
from components.dataset.loaders import Place, bring, from_rows, load, read_file
from components.dataset.presets import PRESETS, convert

ROWS = [{"prompt": f"{n}+1=", "answer": n + 1} for n in range(8)]
GSM8K = [
    {"question": f"tom has {n} hats and gets 1000", "answer": f"{n} + 1000 = <<{n}+1000>>\n#### 1,00{n}"}
    for n in range(8)
]


def hub_folder(path, rows, **splits):
    """A data set as `push_to_hub` lays it out: Parquet below `data/`, configurations in the README's head."""
    (path / "data").mkdir(parents=True)
    for split, count in splits.items():
        pq.write_table(pa.Table.from_pylist(rows[:count]), path / "data" / f"{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    (path / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "array.json"])
def test_a_single_file_is_read_as_it_is(name, tmp_path):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name == "array.json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert load(Place(str(path)), "train", tmp_path).to_pylist() == ROWS


def test_a_folder_of_files_named_by_split(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[1]))
    assert load(Place(str(tmp_path)), "test", tmp_path).to_pylist() == ROWS[1:2]


def test_a_folder_in_the_hubs_format(tmp_path):
    path = hub_folder(tmp_path / "hub", ROWS, train=6, test=2)
    assert load(Place(str(path), "main"), "train", tmp_path / "work").to_pylist() == ROWS[:6]
    assert load(Place(str(path)), "test", tmp_path / "work").to_pylist() == ROWS[:2]
    with pytest.raises(DataError, match=r"split validation: Unknown split"):
        load(Place(str(path)), "validation", tmp_path / "work")


def test_a_data_set_saved_to_disk(tmp_path):
    import datasets

    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    both.save_to_disk(str(tmp_path / "both"))
    both["test"].save_to_disk(str(tmp_path / "one"))
    assert load(Place(str(tmp_path / "both")), "train", tmp_path).to_pylist() == ROWS
    assert load(Place(str(tmp_path / "one")), "train", tmp_path).to_pylist() == ROWS[:1]
    with pytest.raises(DataError, match="has no split dev; it has train, test"):
        load(Place(str(tmp_path / "both")), "dev", tmp_path)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """moto's S3 server with a bucket of rows."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="data")
        lines = "\n".join(json.dumps(row) for row in ROWS).encode()
        for key in ("rows.jsonl", "set/train.jsonl", "set/test.jsonl", "bad/../escape.jsonl"):
            client.put_object(Bucket="data", Key=key, Body=lines)
        yield f"?endpoint={endpoint}&region=us-east-1"
        server.stop()


def test_rows_from_object_storage(bucket, tmp_path):
    place = bring(Place(f"s3://data/rows.jsonl{bucket}"), tmp_path / "source")
    assert place.is_file
    assert load(place, "train", tmp_path).to_pylist() == ROWS
    folder = bring(Place(f"s3://data/set/{bucket}"), tmp_path / "set")
    assert load(folder, "test", tmp_path).to_pylist() == ROWS


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://data/absent.jsonl", r"cannot read s3://data/absent.jsonl.*404"),
        ("s3://nobody/rows.jsonl", r"cannot read s3://nobody/rows.jsonl"),
        ("s3://data/absent/", "no objects below that folder"),
        ("s3://data/bad/", "an object's key is no file name"),
        ("s3://data", "want s3://bucket/key or s3://bucket/folder/"),
    ],
)
def test_object_storage_without_the_rows_is_an_error(url, message, bucket, tmp_path):
    with pytest.raises(DataError, match=message):
        bring(Place(url + bucket), tmp_path / "source")
    assert not (tmp_path / "escape.jsonl").exists()


BAD_FILES = {
    "rows.jsonl": ('{"prompt": "a"}\n{"prompt": \n', r"rows.jsonl, line 2 is not JSON: Expecting value at column"),
    "list.jsonl": ('["a"]\n', r"list.jsonl, row 1: want an object with a name for each column"),
    "mixed.jsonl": ('{"prompt": "a"}\n{"prompt": 2}\n', "the values of column prompt differ in kind"),
    "rows.parquet": ("no parquet", "is not a readable Parquet file"),
    "rows.csv": ("prompt\na\n", r"want a file that ends in \.jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_an_error(name, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_file(tmp_path / name)


def test_a_file_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("source", ["./absent.jsonl", "/absent", "rows.parquet"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source, tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        load(Place(source), "train", tmp_path)


def test_a_column_of_any_row_is_a_column():
    table = from_rows([{"prompt": "a"}, {"prompt": "b", "answer": 2}], "rows")
    assert table.to_pylist() == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": 2}]


def test_gsm8k_answers_are_what_stands_behind_the_hashes():
    table = pa.Table.from_pylist(GSM8K)
    row = convert(table, PRESETS["gsm8k"], "gsm8k").to_pylist()[3]
    assert row == {"prompt": "tom has 3 hats and gets 1000", "answer": "1003", "solution": "3 + 1000 = <<3+1000>>"}


def test_a_preset_over_another_data_set_is_refused():
    with pytest.raises(DataError, match="preset gsm8k reads columns question, answer; there are prompt, answer"):
        convert(pa.Table.from_pylist(ROWS), PRESETS["gsm8k"], "gsm8k")
    with pytest.raises(DataError, match="an answer without ####"):
        convert(pa.table({"question": ["1+1"], "answer": ["2"]}), PRESETS["gsm8k"], "gsm8k")


def test_math500_rows():
    row = {
        "problem": "x",
        "answer": r"\frac{1}{2}",
        "solution": "s",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "u",
    }
    (got,) = convert(pa.Table.from_pylist([row]), PRESETS["math500"], "math500").to_pylist()
    assert got == {"prompt": "x", "answer": r"\frac{1}{2}", "solution": "s", "subject": "Algebra", "level": 2}


def test_gsm8k_from_a_local_copy_in_the_hubs_format(case, plain_tokenizer_folder, tmp_path):
    path = hub_folder(tmp_path / "hub", GSM8K, train=8, test=2)
    case.run(case.policy(plain_tokenizer_folder), source=str(path), preset="gsm8k")
    assert case.table("eval").column("answer").to_pylist() == ["1000", "1001"]
    assert case.table("train").column("answer").to_pylist() == [f"100{n}" for n in range(2, 8)]


def test_one_file_has_no_splits(case, plain_tokenizer_folder, write_rows):
    policy, source = case.policy(plain_tokenizer_folder), write_rows(ROWS)
    with pytest.raises(
        DataError, match=r"is one file and has no split test: name the held-out rows in dataset\.eval_source"
    ):
        case.run(policy, source=source, eval_split="test")


def test_held_out_rows_of_their_own_file(case, plain_tokenizer_folder, write_rows):
    policy, source = case.policy(plain_tokenizer_folder), write_rows(ROWS)
    case.run(policy, source=source, eval_source=write_rows(ROWS[:2], "held-out.jsonl"))
    assert case.table("eval").column("prompt").to_pylist() == ["0+1=", "1+1="]
    assert case.table("train").column("prompt").to_pylist() == [f"{n}+1=" for n in range(2, 8)]


def test_a_hub_that_cannot_be_reached_is_an_error(tmp_path):
    code = (
        "import sys; from pathlib import Path; from components.dataset.loaders import Place, load\n"
        "try:\n    load(Place('nobody/nothing'), 'train', Path(sys.argv[1]))\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert re.match("DataError data set nobody/nothing, split train: .*without a network, put a local", result.stdout)

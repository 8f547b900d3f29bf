"""Tables: row groups of whole groups of completions, readers that take some prompts, versions that are refused."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common import records
from components.common.errors import DataError
from components.common.records import iter_groups, read_prompts, read_table, write_table

FIELDS = {"prompt_id": pa.string(), "sample_index": pa.int32(), "completion": pa.string()}


def table_of(sizes: dict[str, int]) -> pa.Table:
    """Groups of completions, of these sizes."""
    rows = [
        {"prompt_id": name, "sample_index": index, "completion": f"{name} {index}"}
        for name, size in sizes.items()
        for index in range(size)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(FIELDS))


@pytest.fixture
def shuffled(tmp_path: Path) -> tuple[Path, dict[str, int]]:
    """300 groups of 7 in no order of their ids, so that statistics rule out little."""
    names = [f"p{number:03d}" for number in range(300)]
    random.Random(0).shuffle(names)
    sizes = dict.fromkeys(names, 7)
    return write_table(table_of(sizes), tmp_path / "train.parquet", FIELDS), sizes


def row_groups(path: Path) -> list[list[str]]:
    file = pq.ParquetFile(path)
    return [file.read_row_group(number).column("prompt_id").to_pylist() for number in range(file.num_row_groups)]


def test_row_groups_hold_whole_groups(shuffled: tuple[Path, dict[str, int]]) -> None:
    """1,024 rows hold 146 groups of 7 and a third of another."""
    groups = row_groups(shuffled[0])
    assert [len(group) for group in groups] == [146 * 7, 146 * 7, 8 * 7]
    assert sum(len(set(group)) for group in groups) == 300  # no prompt in two of them


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({}, [0]),
        ({"a": 1024, "b": 1}, [1024, 1]),
        ({"a": 1500, "b": 2, "c": 1500}, [1500, 2, 1500]),
        ({"a": 1000, "b": 24, "c": 3}, [1024, 3]),
    ],
)
def test_groups_of_any_size(tmp_path: Path, sizes: dict[str, int], wanted: list[int]) -> None:
    path = write_table(table_of(sizes), tmp_path / "table.parquet", FIELDS)
    assert [len(group) for group in row_groups(path)] == wanted
    assert read_table(path, FIELDS).equals(table_of(sizes))


def test_a_reader_takes_the_row_groups_of_its_prompts_alone(
    shuffled: tuple[Path, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sizes = shuffled
    names, taken = list(sizes), []
    real = pq.ParquetFile.read_row_groups

    def counted(self: pq.ParquetFile, numbers: list[int], **what: object) -> pa.Table:
        taken.append(list(numbers))
        return real(self, numbers, **what)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    first, last = names[0], names[-1]
    found = read_prompts(path, FIELDS, [first])
    assert found.to_pylist() == table_of({first: 7}).to_pylist()
    assert read_prompts(path, FIELDS, {first, last}, ["completion"]).column_names == ["prompt_id", "completion"]
    assert read_prompts(path, FIELDS, ["p999"]).num_rows == 0
    assert taken == [[0], [0, 2], []]


def test_statistics_spare_reading_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sorted table one row group alone can hold a prompt; of the others not even the ids are read."""
    path = write_table(table_of({f"p{number:03d}": 7 for number in range(300)}), tmp_path / "t.parquet", FIELDS)
    looked, real = [], pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, number: int, **what: object) -> pa.Table:
        looked.append(number)
        return real(self, number, **what)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert read_prompts(path, FIELDS, ["p200"]).num_rows == 7
    assert looked == [1]


@pytest.mark.parametrize("read", [read_table, lambda path, fields: read_prompts(path, fields, ["a"])])
def test_other_versions_and_other_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: object
) -> None:
    path = write_table(table_of({"a": 2}), tmp_path / "table.parquet", FIELDS)
    read(path, FIELDS)
    with pytest.raises(DataError, match="no column reward"):
        read(path, FIELDS | {"reward": pa.float64()})
    with monkeypatch.context() as patch:
        patch.setattr(records, "SCHEMA_VERSION", 2)
        with pytest.raises(DataError, match="want schema version 2, got 1; run the stage that made it again"):
            read(path, FIELDS)
    pq.write_table(table_of({"a": 2}), path)
    with pytest.raises(DataError, match="want schema version 1, got none"):
        read(path, FIELDS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"table\.parquet is not a readable Parquet file"):
        read(path, FIELDS)
    with pytest.raises(DataError, match="no table at"):
        read(tmp_path / "nothing", FIELDS)


def test_groups_are_runs_of_one_prompt() -> None:
    assert list(iter_groups(table_of({"a": 2, "b": 1, "c": 3}))) == [(0, 2), (2, 3), (3, 6)]

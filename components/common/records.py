"""The tables that flow between stages, as Parquet: one schema in one place, checked on every read.

# P prompts, G completions a prompt (a group), T tokens
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError

if TYPE_CHECKING:  # pyarrow is imported where a table is touched, so that `--help` answers at once
    import pyarrow as pa

SCHEMA_VERSION = 1
ROWS_PER_GROUP = 1024
"""Rows of a Parquet row group, what a reader takes at a time: as many whole groups of completions as fit."""

SPLITS = ("train", "eval")
REWARD_PREFIX = "rewards/"
MESSAGES = "prompt_messages"
"""Column of prompts and completions: the chat messages a prompt was rendered from, as JSON; plain text has none."""


def prompt_fields() -> "dict[str, pa.DataType]":
    """Columns of a prompts table; the data set's own columns (ground truth) stand beside them."""
    import pyarrow as pa

    return {"prompt_id": pa.string(), "prompt": pa.string(), "prompt_ids": pa.list_(pa.int32())}


def completion_fields() -> "dict[str, pa.DataType]":
    """Columns of a completions table, one row a sample; the G rows of a group are contiguous.

    `logprobs` are the sampling distribution's own (after temperature, top-k and top-p), one a completion token.
    """
    import pyarrow as pa

    return prompt_fields() | {
        "sample_index": pa.int32(),
        "completion": pa.string(),
        "completion_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "finish_reason": pa.string(),  # "stop", "length" or "error"
        "seed": pa.int64(),
        "policy_digest": pa.string(),
    }


def reward_fields(functions: Sequence[str]) -> "dict[str, pa.DataType]":
    """Columns of a rewards table: `reward` is the weighted total, null when no function applied."""
    import pyarrow as pa

    columns = {REWARD_PREFIX + name: pa.float64() for name in functions}
    keys = {"prompt_id": pa.string(), "sample_index": pa.int32()}
    return keys | {"reward": pa.float64()} | columns | {"error": pa.string()}


def write_table(table: "pa.Table", path: Path, fields: "Mapping[str, pa.DataType]") -> Path:
    """Writes a table whose columns `fields` are cast to their types; other columns are kept as they are.

    Raises:
        DataError: a column of `fields` is missing or does not cast.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = _conform(table, fields, where=path.name)
    table = table.replace_schema_metadata({"grpo_schema_version": str(SCHEMA_VERSION)})
    numeric_lists = [
        f"{field.name}.list.element"
        for field in table.schema
        if pa.types.is_list(field.type) and pa.types.is_primitive(field.type.value_type)
    ]
    texts = [field.name for field in table.schema if not pa.types.is_list(field.type)]
    encoding = dict.fromkeys(numeric_lists, "BYTE_STREAM_SPLIT")
    writer = pq.ParquetWriter(
        path, table.schema, compression="zstd", compression_level=1, use_dictionary=texts,
        column_encoding=encoding or None,
    )  # fmt: skip
    with writer:
        for start, stop in _row_groups(table):
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    return path


def _row_groups(table: "pa.Table") -> Iterator[tuple[int, int]]:
    """Start and end row of each row group; no group of completions is divided."""
    groups = iter_groups(table) if "prompt_id" in table.column_names else ((row, row + 1) for row in range(len(table)))
    first = last = 0
    for start, stop in groups:
        if stop - first > ROWS_PER_GROUP and start > first:
            yield first, start
            first = start
        last = stop
    yield first, last


def read_table(path: Path, fields: "Mapping[str, pa.DataType]", columns: Sequence[str] | None = None) -> "pa.Table":
    """Reads a table and checks it against `fields`; `columns` limits what is read from disk.

    Raises:
        DataError: not Parquet, of another schema version, or a column missing or of another type.
    """
    return _read(path, fields, columns, lambda file: range(file.num_row_groups))


def read_prompts(
    path: Path, fields: "Mapping[str, pa.DataType]", prompts: Collection[str], columns: Sequence[str] | None = None
) -> "pa.Table":
    """Rows of some prompts, checked like `read_table`'s; only the row groups that hold them are read.

    Statistics rule out the row groups all of whose ids lie elsewhere; of the others the ids alone are read first.

    Raises:
        DataError: as `read_table`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(sorted(prompts), pa.string())

    def holds(file: Any, number: int) -> bool:
        group = file.metadata.row_group(number)
        places = [place for place in range(group.num_columns) if group.column(place).path_in_schema == "prompt_id"]
        found = group.column(places[0]).statistics if places else None
        if found is not None and found.has_min_max and not any(found.min <= one <= found.max for one in prompts):
            return False
        ids = file.read_row_group(number, columns=["prompt_id"]).column(0)
        return bool(pc.any(pc.is_in(ids, wanted)).as_py())

    def pick(file: Any) -> list[int]:
        return [number for number in range(file.num_row_groups) if holds(file, number)]

    also = None if columns is None else list(dict.fromkeys(["prompt_id", *columns]))
    table = _read(path, fields, also, pick)
    return table.filter(pc.is_in(table.column("prompt_id"), wanted))


def _read(
    path: Path,
    fields: "Mapping[str, pa.DataType]",
    columns: Sequence[str] | None,
    row_groups: Callable[[Any], Sequence[int]],
) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_version(file.schema_arrow.metadata, path)
            table = file.read_row_groups(row_groups(file), columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise DataError(f"no table at {path}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name} is not a readable Parquet file: {error}") from None
    wanted = {name: kind for name, kind in fields.items() if columns is None or name in columns}
    return _conform(table, wanted, where=path.name)


def iter_groups(table: "pa.Table") -> Iterator[tuple[int, int]]:
    """Start and end row of each run of rows with one `prompt_id`."""
    ids = table.column("prompt_id").to_pylist()
    start = 0
    for row in range(1, len(ids) + 1):
        if row == len(ids) or ids[row] != ids[start]:
            yield start, row
            start = row


def data_columns(table: "pa.Table", fields: Mapping[str, Any]) -> list[str]:
    """Names of the data set's own columns in a table."""
    return [name for name in table.column_names if name not in fields and name != MESSAGES]


def _check_version(metadata: Mapping[bytes, bytes] | None, path: Path) -> None:
    got = (metadata or {}).get(b"grpo_schema_version", b"none").decode()
    if got != str(SCHEMA_VERSION):
        raise DataError(
            f"{path.name}: want schema version {SCHEMA_VERSION}, got {got}; run the stage that made it again"
        )


def _conform(table: "pa.Table", fields: "Mapping[str, pa.DataType]", *, where: str) -> "pa.Table":
    import pyarrow as pa

    missing = [name for name in fields if name not in table.column_names]
    if missing:
        raise DataError(f"{where}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    for name, kind in fields.items():
        position = table.column_names.index(name)
        if table.schema.field(position).type != kind:
            try:
                table = table.set_column(position, pa.field(name, kind), table.column(position).cast(kind))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"{where}: column {name} is {table.schema.field(position).type}, want {kind}: {error}"
                ) from None
    return table

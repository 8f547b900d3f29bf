"""Reads rows from wherever they are: files, folders, object storage, the Hugging Face hub. Nothing read is executed."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError
from components.dataset.s3 import download

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("grpo")

JSON_LINES = (".jsonl", ".ndjson", ".json")
FILES = (*JSON_LINES, ".parquet")
SAVED_TO_DISK = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Place:
    """Where rows come from: a path or a hub id, with a hub data set's configuration and revision."""

    source: str
    subset: str | None = None
    revision: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is one file, and so has no splits."""
        return Path(self.source).is_file()


def bring(place: Place, folder: Path) -> Place:
    """The place itself, or, of an `s3://` source, where it was downloaded to."""
    if not place.source.startswith("s3://"):
        return place
    log.info("downloading %s", place.source.partition("?")[0])
    return Place(str(download(place.source, folder)), place.subset, place.revision)


def load(place: Place, split: str, folder: Path) -> "pa.Table":
    """All rows of a split; `folder` is for temporary files.

    Raises:
        DataError: no such file, data set or split, or its content cannot be read.
    """
    path = Path(place.source)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return _from_folder(path, place, split, folder)
    if path.suffix in FILES or place.source.startswith((".", "/", "~")):
        raise DataError(f"dataset.source: no file or folder {place.source}")
    return _from_hub(place.source, place, split, cache=None)


def _from_folder(path: Path, place: Place, split: str, folder: Path) -> "pa.Table":
    if any((path / name).exists() for name in SAVED_TO_DISK):
        return _from_disk(path, split)
    for name in (f"{split}{suffix}" for suffix in FILES):
        if (path / name).is_file():
            return read_file(path / name)
    return _from_hub(str(path), place, split, cache=folder / "cache")


def _from_disk(path: Path, split: str) -> "pa.Table":
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a saved data set: {error}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split}; it has {', '.join(found)}")
        found = found[split]
    return _as_table(found)


def _from_hub(name: str, place: Place, split: str, cache: Path | None) -> "pa.Table":
    """A data set of the hub, or a local folder laid out as one."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    options: dict[str, Any] = {"revision": place.revision} if cache is None else {"cache_dir": str(cache)}
    try:
        found = datasets.load_dataset(name, place.subset, split=split, **options)
    except (ValueError, OSError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data set {name}, split {split}: {error}; check dataset.source, subset and the split's name; without a "
            "network, put a local copy's folder in dataset.source and, for a preset, its name in dataset.preset"
        ) from None
    return _as_table(found)


def _as_table(found: Any) -> "pa.Table":
    return found.with_format("arrow")[:].replace_schema_metadata(None)


def read_file(path: Path) -> "pa.Table":
    """Rows of a JSONL or Parquet file.

    Raises:
        DataError: another kind of file, or one that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        try:
            return pq.read_table(path).replace_schema_metadata(None)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    if path.suffix not in JSON_LINES:
        raise DataError(f"{path}: want a file that ends in {', '.join(FILES)}")
    return from_rows(list(_json_rows(path)), str(path))


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows, numbered = _parsed(text, str(path)), False
    else:
        rows, numbered = text.split("\n"), True
    for number, row in enumerate(rows, 1):
        if numbered and not row.strip():
            continue
        value = _parsed(row, f"{path}, line {number}") if numbered else row
        if not isinstance(value, dict):
            raise DataError(f"{path}, row {number}: want an object with a name for each column, got {str(value)[:60]}")
        yield value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None


def from_rows(rows: list[dict[str, Any]], where: str) -> "pa.Table":
    """Rows as a table: a column is in it when any row has it.

    Raises:
        DataError: values of one column differ in kind.
    """
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(f"{where}: the values of column {name} differ in kind: {error}") from None
    return pa.table(columns)

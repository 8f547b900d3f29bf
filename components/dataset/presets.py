"""Known data sets: where they are, and how their rows become prompts with answers that can be checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A known data set. `convert` makes `prompt`, `answer` and other columns of a row, out of those in `needs`."""

    source: str
    subset: str | None
    train_split: str
    eval_split: str | None
    needs: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]


def gsm8k_row(row: Row) -> dict[str, Any]:
    """Grade-school mathematics (arXiv:2110.14168): the answer is the number behind `####`, thousands commas left out.

    Raises:
        DataError: the row has no `####`.
    """
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise DataError(f"gsm8k: an answer without ####: {row['answer'][:80]!r}; is this data set GSM8K?")
    return {"prompt": row["question"], "answer": answer.strip().replace(",", ""), "solution": solution.strip()}


def math500_row(row: Row) -> dict[str, Any]:
    """500 problems of MATH (arXiv:2305.20050): the answer is LaTeX, for `math_verify`."""
    kept = {name: row[name] for name in ("subject", "level") if name in row}
    return {"prompt": row["problem"], "answer": row["answer"], "solution": row["solution"]} | kept


PRESETS = {
    "gsm8k": Preset("openai/gsm8k", "main", "train", "test", ("question", "answer"), gsm8k_row),
    "math500": Preset("HuggingFaceH4/MATH-500", None, "test", None, ("problem", "answer", "solution"), math500_row),
}


def convert(table: "pa.Table", preset: Preset, name: str) -> "pa.Table":
    """The table with the preset's columns.

    Raises:
        DataError: a column the preset reads is missing, or a row is not of its form.
    """
    import pyarrow as pa

    missing = [column for column in preset.needs if column not in table.column_names]
    if missing:
        raise DataError(
            f"preset {name} reads columns {', '.join(preset.needs)}; there are {', '.join(table.column_names)}: "
            "leave dataset.preset out and name dataset.prompt_column"
        )
    rows = [preset.convert(row) for row in table.to_pylist()]
    return pa.Table.from_pylist(rows) if rows else pa.table({"prompt": pa.array([], pa.string())})

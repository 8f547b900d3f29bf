"""Scored rollouts: the completions of one or several shards beside their rewards, read as one table.

A scored artifact has the rollout's own files, `train.parquet` and `eval.parquet`, or, of several shards,
`train-00.parquet`, `train-01.parquet` …, and one `train_rewards.parquet` and `eval_rewards.parquet` whose rows
follow the rows of those files in the order of their names. Written by reward, read by update and evaluate.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError
from components.common.records import (
    REWARD_PREFIX,
    SPLITS,
    completion_fields,
    read_prompts,
    read_table,
    reward_fields,
)

if TYPE_CHECKING:
    import pyarrow as pa

KEYS = ("prompt_id", "sample_index")
SHOWN = ("sample_index", "prompt", "completion", "finish_reason", "policy_digest")
"""What people want to see of a completion."""


def shard_file(split: str, position: int, num_shards: int) -> str:
    """Name of a shard's completions inside a scored artifact."""
    return f"{split}.parquet" if num_shards == 1 else f"{split}-{position:02d}.parquet"


def rewards_file(split: str) -> str:
    """Name of a split's rewards inside a scored artifact."""
    return f"{split}_rewards.parquet"


def completion_files(names: Iterable[str], split: str) -> list[str]:
    """Which of an artifact's files hold completions of `split`, in the order of their rows."""
    pattern = re.compile(rf"{re.escape(split)}(-(\d+))?\.parquet")
    found = [(int(match[2] or 0), name) for name in names if (match := pattern.fullmatch(name))]
    return [name for _, name in sorted(found)]


def read_scored(folder: Path, split: str, columns: Sequence[str] | None = None) -> "pa.Table | None":
    """Completions of `split` with `reward`, `rewards/<function>` and `error` beside them; None: it has no such split.

    `columns` limits what is read, of either kind; `prompt_id` and `sample_index` always come along.

    Raises:
        DataError: a file is missing or unreadable, or the rewards are not those of these completions.
    """
    import pyarrow as pa

    files = completion_files((path.name for path in folder.iterdir()), split)
    if not files:
        return None
    wanted = None if columns is None else {*columns, *KEYS}
    tables = [_read_completions(folder / name, wanted) for name in files]
    completions = pa.concat_tables(tables, promote_options="permissive")
    rewards = read_table(folder / rewards_file(split), reward_fields([]))
    if any(not completions.column(key).equals(rewards.column(key)) for key in KEYS):
        raise DataError(f"{rewards_file(split)} does not belong to {', '.join(files)}: run the reward stage again")
    for name in rewards.column_names:
        if name not in KEYS and (wanted is None or name in wanted):
            completions = completions.append_column(rewards.schema.field(name), rewards.column(name))
    return completions


def samples_of(folder: Path, prompt_id: str) -> list[dict[str, Any]]:
    """Completions of one prompt, of whatever split, in the files of a rollout or scored artifact; with their rewards,
    where they have been scored.

    Raises:
        DataError: a file is unreadable.
    """
    names = [path.name for path in folder.iterdir()]
    found: list[dict[str, Any]] = []
    for split in SPLITS:
        rewards = {}
        if rewards_file(split) in names:
            table = read_prompts(folder / rewards_file(split), reward_fields([]), [prompt_id])
            rewards = {row["sample_index"]: row for row in table.to_pylist()}
        for name in completion_files(names, split):
            table = read_prompts(folder / name, completion_fields(), [prompt_id], SHOWN)
            found += [{"split": split} | row | rewards.get(row["sample_index"], {}) for row in table.to_pylist()]
    return found


def _read_completions(path: Path, wanted: "set[str] | None") -> "pa.Table":
    import pyarrow.parquet as pq

    if wanted is None:
        return read_table(path, completion_fields())
    present = pq.read_schema(path).names
    return read_table(path, completion_fields(), columns=[name for name in present if name in wanted])


def function_columns(table: "pa.Table") -> list[str]:
    """Names of the reward functions a scored table has columns of."""
    return [name.removeprefix(REWARD_PREFIX) for name in table.column_names if name.startswith(REWARD_PREFIX)]

"""The completions table of a rollout, from the groups and what was drawn for them.

# B samples (rows), T completion tokens
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import DataError
from components.common.records import completion_fields, prompt_fields, write_table
from components.rollout.plan import Group
from components.rollout.resume import Sample

if TYPE_CHECKING:
    import pyarrow as pa

Samples = Mapping[tuple[str, str], Sequence[Sample]]


def write_completions(
    path: Path, prompts: "pa.Table", groups: Sequence[Group], samples: Samples, texts: Sequence[str], digest: str
) -> Path:
    """Writes one row a sample, in the order of `groups`; the data set's own columns follow each prompt.

    Raises:
        DataError: the data set has a column of a name that completions use.
    """
    import pyarrow as pa

    own = set(completion_fields()) - set(prompt_fields())
    if taken := own & set(prompts.column_names):
        raise DataError(f"the data set has a column named {', '.join(sorted(taken))}, which completions use: rename it")
    table = prompts.take([group.row for group in groups for _ in group.requests])
    rows = [sample for group in groups for sample in samples[group.key]]
    requests = [request for group in groups for request in group.requests]
    columns = {
        "sample_index": pa.array([request.sample_index for request in requests], pa.int32()),
        "completion": pa.array(texts, pa.string()),
        "completion_ids": lists([row.completion_ids for row in rows], pa.int32()),
        "logprobs": lists([row.logprobs for row in rows], pa.float32()),
        "finish_reason": pa.array([row.finish_reason for row in rows], pa.string()),
        "seed": pa.array([request.seed for request in requests], pa.int64()),
        "policy_digest": pa.array([digest] * len(rows), pa.string()),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    return write_table(table, path, completion_fields())


def lists(arrays_BT: "Sequence[Sequence]", kind: "pa.DataType") -> "pa.ListArray":
    """A list column from one array a row, without a Python object a token."""
    import numpy as np
    import pyarrow as pa

    offsets = np.zeros(len(arrays_BT) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays_BT], out=offsets[1:])
    # pyarrow's own table of dtypes wants pandas, which the image of rollout does not have
    dtype = {pa.int32(): np.int32, pa.float32(): np.float32}[kind]
    values = np.concatenate([*arrays_BT, np.empty(0, dtype)]).astype(dtype)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))

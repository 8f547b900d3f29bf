"""Brings the shards of a rollout together: one order whatever order they come in, one policy, no sample twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError, StageError
from components.common.manifest import File, Manifest
from components.common.records import SPLITS, completion_fields, iter_groups, read_table
from components.common.scored import KEYS, shard_file
from components.common.settings import load_stage
from components.common.stage import Stage
from components.reward.config import RewardSettings

if TYPE_CHECKING:
    import pyarrow as pa

UNREAD = {"logprobs", "seed"}
"""Columns no reward function is given."""


@dataclass(frozen=True)
class Merged:
    """Completions of one split over all shards, and the files they come from, under their names in the result."""

    table: "pa.Table"
    files: list[File]


def in_order(paths: Sequence[Path], settings: str) -> tuple[list[Path], int]:
    """The shards' manifests in the order of their content, and the run's iteration they belong to, from 0.

    Raises:
        StageError: no shards, artifacts that are no rollouts, or rollouts of different iterations.
    """
    context, _ = load_stage(RewardSettings, settings)
    manifests = {path: Manifest.load(Path(path)) for path in paths}
    if not manifests:
        raise StageError("reward was given no rollout: completions is empty")
    for path, manifest in manifests.items():
        if manifest.kind != "rollout":
            raise StageError(
                f"completions: want rollouts, got {manifest.kind} at {path}; check how the stages are wired"
            )
    iterations = {manifest.iteration for manifest in manifests.values()}
    if len(iterations) > 1 or None in iterations:
        raise StageError(f"completions: want shards of one iteration, got iterations {sorted(map(str, iterations))}")
    ordered = sorted(paths, key=lambda path: manifests[path].digest)
    return ordered, int(iterations.pop() or 0) - context.first_iteration


def merge(stage: Stage[RewardSettings]) -> dict[str, Merged]:
    """Fetches the shards and merges each split that any of them has.

    Raises:
        DataError: shards of different policies, or one sample twice.
        StageError: no completions at all.
    """
    manifests = stage.manifests("completions")
    wanted = [f"{split}.parquet" for split in SPLITS]
    folders = [stage.fetch_manifest(shard, f"shard-{i:02d}", wanted) for i, shard in enumerate(manifests)]
    found = {}
    for split in SPLITS:
        name = f"{split}.parquet"
        having = [(folder, shard) for folder, shard in zip(folders, manifests, strict=True) if name in shard.names]
        if having:
            found[split] = _merge_split(split, having)
    if not any(merged.table.num_rows for merged in found.values()):
        raise StageError("the rollout has no completions: were there prompts to sample?")
    _check_policy([merged.table for merged in found.values()])
    return found


def _merge_split(split: str, shards: Sequence[tuple[Path, Manifest]]) -> Merged:
    import pyarrow as pa

    name = f"{split}.parquet"
    tables = [_read(folder / name) for folder, _ in shards]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{name}: the shards' columns differ in type: {error}") from None
    _check_keys(table, name)
    entries = [next(file for file in shard.files if file.name == name) for _, shard in shards]
    files = [
        entry.model_copy(update={"name": shard_file(split, position, len(shards))})
        for position, entry in enumerate(entries)
    ]
    return Merged(table, files)


def _read(path: Path) -> "pa.Table":
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    return read_table(path, completion_fields(), [name for name in names if name not in UNREAD])


def _check_keys(table: "pa.Table", name: str) -> None:
    """Every sample once, the samples of a prompt together."""
    counts = table.group_by(list(KEYS)).aggregate([([], "count_all")])
    if counts.num_rows < table.num_rows:
        twice = next(row for row in counts.to_pylist() if row["count_all"] > 1)
        raise DataError(
            f"{name}: sample {twice['sample_index']} of prompt {twice['prompt_id']} comes {twice['count_all']} times; "
            "was one shard given twice, or were two shards sampled with the same number?"
        )
    num_groups = sum(1 for _ in iter_groups(table))
    if num_groups != len(table.column("prompt_id").unique()):
        raise DataError(f"{name}: the samples of a prompt are not together; each group must be sampled by one shard")


def _check_policy(tables: Sequence["pa.Table"]) -> None:
    digests = sorted({digest for table in tables for digest in table.column("policy_digest").unique().to_pylist()})
    if len(digests) > 1:
        raise DataError(
            f"completions of {len(digests)} policies in one iteration: {', '.join(map(str, digests))}; "
            "their rewards cannot be compared: sample every shard from the same policy"
        )


def rollout_metadata(shards: Sequence[Manifest]) -> dict[str, Any]:
    """What the shards' manifests all say, among it how they were sampled.

    Raises:
        DataError: they were sampled differently.
    """
    first, *others = (shard.metadata for shard in shards)
    for other in others:
        if other.get("sampling") != first.get("sampling"):
            raise DataError(f"shards sampled differently: {first.get('sampling')} and {other.get('sampling')}")
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def rollout_metrics(shards: Sequence[Manifest]) -> dict[str, float]:
    """The shards' own `rollout/...` metrics: counts and speeds add up, the longest duration, the mean of the rest."""
    names = {name for shard in shards for name in shard.metrics if name.startswith("rollout/")}
    return {name: _combined(name, [s.metrics[name] for s in shards if name in s.metrics]) for name in sorted(names)}


def _combined(name: str, values: list[float]) -> float:
    if "num_" in name or name.endswith("per_second"):
        return sum(values)
    return max(values) if name.endswith("seconds") else sum(values) / len(values)

"""Scores the completions of one iteration: merges the shards, runs the reward functions apart, adds the rewards.

# N completions, F reward functions
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import StageError
from components.common.stage import Stage, run_stage
from components.reward.config import RewardFunction, RewardSettings
from components.reward.merge import Merged, in_order, merge, rollout_metadata, rollout_metrics

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from components.reward.scoring import Scores

log = logging.getLogger("grpo")

GENERATION_FAILED = "not generated"
ERRORS_SHOWN = 3


def run(settings: str, completions: list[Path], scored: Path) -> None:
    """Scores completions with the reward functions of the settings.

    settings: JSON of the run's context and this stage's settings, or a file of it. completions: manifests of the
    rollout's shards, in any order. scored: manifest to write.
    """
    ordered, iteration = in_order(completions, settings)
    stage = Stage(
        "reward", RewardSettings, settings, iteration=iteration,
        inputs={"completions": ordered}, outputs={"scored": scored},
    )  # fmt: skip
    run_stage(stage, _reward)


def _reward(stage: Stage[RewardSettings]) -> None:
    import pyarrow as pa

    splits = merge(stage)
    shards = stage.manifests("completions")
    metadata = rollout_metadata(shards)
    everything = pa.concat_tables([split.table for split in splits.values()], promote_options="permissive")
    results = _score(stage, everything)
    functions = stage.settings.functions
    totals_N, columns, errors_N = combine(functions, results, everything)
    _check_errors(stage.settings, results, everything)
    files: dict[str, Path] = {}
    metrics = rollout_metrics(shards)
    start = 0
    for split, merged in splits.items():
        rows = slice(start, start + merged.table.num_rows)
        start = rows.stop
        own = {name: values[rows] for name, values in columns.items()}
        path = _write(stage.work_dir, split, merged.table, totals_N[rows], own, errors_N[rows])
        files[path.name] = path
        metrics |= _metrics(split, merged, totals_N[rows], own, errors_N[rows])
    stage.publish(
        "scored", kind="scored", files=files, reuse=[file for merged in splits.values() for file in merged.files],
        metrics=metrics, metadata=metadata | {"rewards": [_described(function) for function in functions]},
    )  # fmt: skip


def _score(stage: Stage[RewardSettings], table: "pa.Table") -> "list[Scores]":
    from components.reward.crew import crew
    from components.reward.scoring import own_columns, score_table

    folder = stage.work_dir / "workers"
    folder.mkdir()
    with crew(_with_sources(stage.settings), folder) as workers:
        for line in workers.check(own_columns(table)):
            log.warning("reward functions are not confined in everything: %s", line)
        return score_table(workers, table, stage.progress)


def _with_sources(settings: RewardSettings) -> RewardSettings:
    """Files of reward functions that did not travel with the settings are read from here."""
    return settings.embedded(Path.cwd())


def combine(
    functions: Sequence[RewardFunction], results: "Sequence[Scores]", table: "pa.Table"
) -> "tuple[np.ndarray, dict[str, np.ndarray], list[str | None]]":
    """Weighted totals, NaN where no function applies; scores by function; what went wrong by completion."""
    import numpy as np

    values_FN = np.array([result.values_N for result in results], dtype=np.float64)  # None becomes NaN
    weights_F = np.array([function.weight for function in functions])
    applies_FN = ~np.isnan(values_FN)
    totals_N = np.where(applies_FN, values_FN, 0.0).T @ weights_F
    totals_N[~applies_FN.any(axis=0)] = np.nan
    errors_N: list[str | None] = [
        GENERATION_FAILED if reason == "error" else None for reason in table.column("finish_reason").to_pylist()
    ]
    for function, result in zip(functions, results, strict=True):
        for row, text in sorted(result.errors.items()):
            errors_N[row] = "; ".join(filter(None, [errors_N[row], f"{function.title}: {text}"]))
    return totals_N, {f.title: values_FN[i] for i, f in enumerate(functions)}, errors_N


def _check_errors(settings: RewardSettings, results: "Sequence[Scores]", table: "pa.Table") -> None:
    """Tells which functions failed on how many completions.

    Raises:
        StageError: one failed on more than `max_error_share` of them.
    """
    num_asked = sum(reason != "error" for reason in table.column("finish_reason").to_pylist())
    faults = []
    for function, result in zip(settings.functions, results, strict=True):
        if not result.errors:
            continue
        shown = list(dict.fromkeys(text for _, text in sorted(result.errors.items())))[:ERRORS_SHOWN]
        failed = f"reward function {function.title} failed on {len(result.errors)} of {num_asked} completions"
        log.warning("%s: %s", failed, " | ".join(shown))
        if len(result.errors) > settings.max_error_share * num_asked:
            faults.append(f"{failed}, first with {shown[0]}")
    if faults:
        limit = f"at most {settings.max_error_share:.0%} may fail"
        raise StageError("\n".join([*faults, f"{limit}: mend the function, or raise reward.max_error_share"]))


def _write(
    folder: Path, split: str, completions: "pa.Table", totals_N: "np.ndarray",
    functions: "Mapping[str, np.ndarray]", errors_N: Sequence[str | None],
) -> Path:  # fmt: skip
    import pyarrow as pa

    from components.common.records import REWARD_PREFIX, reward_fields, write_table
    from components.common.scored import KEYS, rewards_file

    columns = {key: completions.column(key) for key in KEYS}
    columns["reward"] = pa.array(totals_N, from_pandas=True)
    columns |= {REWARD_PREFIX + name: pa.array(values_N, from_pandas=True) for name, values_N in functions.items()}
    columns["error"] = pa.array(errors_N, pa.string())
    return write_table(pa.table(columns), folder / rewards_file(split), reward_fields(list(functions)))


def _metrics(
    split: str, merged: Merged, totals_N: "np.ndarray", functions: "Mapping[str, np.ndarray]",
    errors_N: Sequence[str | None],
) -> dict[str, float]:  # fmt: skip
    from components.reward.metrics import split_metrics

    num_errors = sum(error is not None for error in errors_N)
    found = split_metrics(merged.table, totals_N, functions, num_errors)
    return found if split == "train" else {f"{split}/{name}": value for name, value in found.items()}


def _described(function: RewardFunction) -> dict[str, object]:
    return {"title": function.title, "name": function.name, "weight": function.weight}

"""Turns a data set into train and eval prompts for one policy: rendered, tokenised, filtered, split.

# P prompts, T tokens of a prompt
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common import champion
from components.common.errors import DataError
from components.common.logs import task_log
from components.common.manifest import Manifest
from components.common.stage import Stage, run_stage
from components.common.tokenizer import tokenizer_digest, tokenizer_files
from components.dataset.config import DatasetSettings
from components.dataset.loaders import Place, bring, load
from components.dataset.presets import PRESETS, Preset, convert

if TYPE_CHECKING:
    import pyarrow as pa

    from components.dataset.prompts import Prompts

log = logging.getLogger("grpo")


def run(settings: str, policy: Path, prompts: Path) -> str:
    """Makes train and eval prompts of a data set; gives "unchanged" when the champion was trained on that, else "new".

    settings: JSON of the run's context and this stage's settings, or a file of it. policy: manifest of the policy
    whose tokenizer is used. prompts: manifest to write.
    """
    stage = Stage("dataset", DatasetSettings, settings, inputs={"policy": policy}, outputs={"prompts": prompts})
    run_stage(stage, _dataset)
    with task_log(stage.events.log_path):
        return _news(stage, Manifest.load(prompts))


def _news(stage: Stage[DatasetSettings], prompts: Manifest) -> str:
    present = champion.read(stage.store, stage.context.fine_tune)
    own = present is not None and present.run == stage.context.run  # resumed after it had moved the pointer itself
    if present is None or own or present.dataset_digest != prompts.metadata["dataset_digest"]:
        return "new"
    log.info("the data set has not changed since %s was accepted (%s)", present.manifest, present.accepted)
    return "unchanged"


def _dataset(stage: Stage[DatasetSettings]) -> None:
    from components.common.records import prompt_fields, write_table
    from components.dataset.split import dataset_digest
    from components.dataset.tokens import context_length, open_tokenizer

    names = tokenizer_files(stage.manifest("policy").names)
    tables = _load_splits(stage.settings, stage.work_dir)
    folder = stage.fetch("policy", names)
    context = context_length(folder)
    splits = _make_splits(tables, open_tokenizer(folder), stage.settings, context)
    files = {}
    for prompts in splits:
        _tell(prompts)
        path = stage.work_dir / f"{prompts.split}.parquet"
        files[path.name] = write_table(prompts.table(), path, prompt_fields())
    stage.publish(
        "prompts", kind="prompts", files=files, metrics=_metrics(splits),
        metadata={
            "dataset_digest": dataset_digest(splits),
            "tokenizer_digest": tokenizer_digest(stage.manifest("policy")),
            "source": stage.settings.source.partition("?")[0],
            "columns": splits[0].columns.column_names,
            "context_length": context,
            "dropped": {prompts.split: {why: n for why, n in prompts.dropped.items() if n} for prompts in splits},
        },
    )  # fmt: skip


def preset_of(settings: DatasetSettings) -> tuple[str, Preset] | None:
    """The preset the rows are read by, if any."""
    name = settings.preset or (settings.source if settings.source in PRESETS else None)
    return (name, PRESETS[name]) if name else None


def _load_splits(settings: DatasetSettings, work_dir: Path) -> "dict[str, pa.Table]":
    """Rows of the train split and, when there is one, of the eval split, in the columns the settings speak of."""
    found = preset_of(settings)
    preset = found[1] if found else None
    at_home = preset is not None and settings.source in PRESETS
    source = preset.source if preset and at_home else settings.source
    subset = settings.subset or (preset.subset if preset and at_home else None)
    place = bring(Place(source, subset, settings.revision), work_dir / "source")
    train_split = settings.train_split or (preset.train_split if preset else "train")
    eval_split = settings.eval_split or (preset.eval_split if preset else None)
    tables = {"train": load(place, train_split, work_dir)}
    if settings.eval_source is not None:
        other = bring(Place(settings.eval_source, settings.subset), work_dir / "eval-source")
        tables["eval"] = load(other, eval_split or "test", work_dir)
    elif eval_split is not None and not (place.is_file and settings.eval_split is None):
        if place.is_file:
            raise DataError(
                f"{settings.source} is one file and has no split {eval_split}: name the held-out rows in "
                "dataset.eval_source, or leave dataset.eval_split out to hold some rows out"
            )
        tables["eval"] = load(place, eval_split, work_dir)
    return {split: convert(table, preset, found[0]) if found and preset else table for split, table in tables.items()}


def _make_splits(
    tables: "dict[str, pa.Table]", tokenizer: Any, settings: DatasetSettings, context: int | None
) -> "list[Prompts]":
    from components.dataset.prompts import make_prompts
    from components.dataset.split import drop_long, hold_out, require_some, thin, without_eval

    made = {split: make_prompts(split, table, tokenizer, settings) for split, table in tables.items()}
    fitting = {split: require_some(drop_long(prompts, settings, context)) for split, prompts in made.items()}
    train = fitting["train"]
    if "eval" in fitting:
        held_out = thin(fitting["eval"], settings.num_eval, settings.split_seed)
        train = without_eval(train, held_out)
    else:
        train, held_out = hold_out(train, settings.num_eval, settings.split_seed)
    if settings.num_train is not None:
        train = train.drop([row >= settings.num_train for row in range(len(train.ids))], "beyond num_train")
    return [require_some(train), held_out]


def _tell(prompts: "Prompts") -> None:
    dropped = ", ".join(f"{count} {reason}" for reason, count in prompts.dropped.items() if count)
    log.info("%s: %d prompts%s", prompts.split, len(prompts.ids), f"; left out: {dropped}" if dropped else "")


def _metrics(splits: "list[Prompts]") -> dict[str, float]:
    metrics = {}
    for prompts in splits:
        lengths_P = [len(ids_T) for ids_T in prompts.tokens_PT]
        metrics |= {
            f"dataset/{prompts.split}_prompts": float(len(lengths_P)),
            f"dataset/{prompts.split}_mean_prompt_length": sum(lengths_P) / len(lengths_P),
            f"dataset/{prompts.split}_max_prompt_length": float(max(lengths_P)),
        }
    return metrics

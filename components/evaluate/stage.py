"""Evaluate: what held-out samples say of a policy, and the fine-tune's story so far as metrics, page and summary."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common import tracking
from components.common.artifacts import fetch
from components.common.manifest import Manifest, now
from components.common.stage import Stage, run_stage
from components.common.store import open_store
from components.evaluate import gather, history, metrics, samples
from components.evaluate.config import EvaluateSettings
from components.evaluate.history import Record
from components.evaluate.report import Report, render
from components.evaluate.summary import markdown

log = logging.getLogger("grpo")

PROMPTS_FILE = "prompts.json"
"""Values per prompt of the baseline and of the latest evaluation: what paired comparisons need."""
SAMPLES_FILE = "samples.json"
"""The completions the report shows."""
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.md"


def run(
    settings: str,
    iteration: int,
    policy: Path,
    scored: Path,
    history: Path,
    evaluation: Path,
    report: Path,
    summary: Path,
) -> None:
    """Judges a policy by its scored samples and continues the history of the fine-tune.

    settings: JSON text, or a file of it, with the sections "run" and "stage".
    iteration: updates the policy has had in this run, from 0.
    policy: manifest of the policy that was sampled; samples of another one are refused.
    scored: manifest of its scored samples; without held-out samples only the history grows.
    history: manifest of the evaluation before; without files at the start of a fine-tune.
    evaluation: manifest written: history.json, prompts.json, samples.json, report.html, summary.md.
    report, summary: HTML page and Markdown text written.
    """
    stage = Stage(
        "evaluate",
        EvaluateSettings,
        settings,
        inputs={"policy": policy, "scored": scored, "history": history},
        outputs={"evaluation": evaluation},
        iteration=iteration,
    )
    run_stage(stage, _evaluate)
    _hand_out(Manifest.load(evaluation), {REPORT_FILE: Path(report), SUMMARY_FILE: Path(summary)})


@dataclass(frozen=True)
class _Past:
    """What the evaluation before handed on."""

    records: list[Record]
    prompts: dict[str, Any]
    samples: list[samples.Row]

    @property
    def baseline(self) -> dict[str, dict[str, float]]:
        """Metric → prompt id → value, of the fine-tune's first evaluation; empty before it."""
        return self.prompts.get("baseline", {}).get("values", {})


def _evaluate(stage: Stage[EvaluateSettings]) -> None:
    started = time.monotonic()
    past = _past(stage)
    tables = _tables(stage)
    gather.check_policy(stage.manifest("policy"), stage.iteration or 0, tables)
    held_out = _judge(stage, tables.get("eval"), past)
    rollouts = gather.rollouts_of(stage.store, stage.manifest("scored"))
    behind = (stage.manifest("scored"), stage.manifest("policy"))
    record = Record(
        iteration=stage.iteration or 0,
        run=stage.context.run,
        policy=stage.manifest("policy").digest,
        created=now().isoformat(),
        metrics=gather.metrics_of(*behind) | held_out.metrics,
        seconds=gather.seconds_of(rollouts, *behind) | {"evaluate": round(time.monotonic() - started, 3)},
    )
    records = history.extend(past.records, record)
    files = _write(stage, record, records, _prompts(past, held_out, record), _samples(stage, tables, past))
    _track(stage, records, stage.run_settings(), files)
    stage.publish("evaluation", kind="evaluation", files=files, metrics=held_out.metrics)
    stage.progress(1, 1, **{name: held_out.metrics[name] for name in (metrics.PASS_AT_1,) if name in held_out.metrics})


def _past(stage: Stage[EvaluateSettings]) -> _Past:
    manifest = stage.manifest("history")
    if not manifest.files:
        return _Past([], {}, [])
    folder = stage.fetch("history", [history.FILE, PROMPTS_FILE, SAMPLES_FILE])
    prompts, shown = (json.loads((folder / name).read_text()) for name in (PROMPTS_FILE, SAMPLES_FILE))
    return _Past(history.load(folder / history.FILE), prompts, shown)


def _tables(stage: Stage[EvaluateSettings]) -> dict[str, samples.Table]:
    folder = stage.fetch("scored")
    chosen = stage.settings
    judged = {
        "correct_reward": chosen.correct_reward,
        "threshold": chosen.correct_threshold,
        "pattern": chosen.answer_pattern,
    }
    tables = {split: samples.read(folder, split, **judged) for split in ("eval", "train")}
    return {split: table for split, table in tables.items() if table is not None}


def _judge(stage: Stage[EvaluateSettings], table: samples.Table | None, past: _Past) -> metrics.Evaluation:
    if table is None:
        log.info("no held-out samples in this iteration")
        return metrics.Evaluation({}, {})
    chance = {"resamples": stage.settings.bootstrap_samples, "seed": stage.context.seed}
    held_out = metrics.evaluate(samples.prompts_of(table), stage.settings.k_values, **chance)
    gain = metrics.gain_over(held_out, past.baseline, **chance)
    if past.baseline and not gain:
        log.warning("the baseline was measured on other prompts: no paired comparison with it")
    return metrics.Evaluation(held_out.metrics | gain, held_out.per_prompt)


def _prompts(past: _Past, held_out: metrics.Evaluation, record: Record) -> dict[str, Any]:
    if not held_out.per_prompt:
        return past.prompts
    latest = {"iteration": record.iteration, "policy": record.policy, "values": held_out.per_prompt}
    return {"baseline": past.prompts.get("baseline", latest), "latest": latest}


def _samples(stage: Stage[EvaluateSettings], tables: Mapping[str, samples.Table], past: _Past) -> list[samples.Row]:
    """Rows for the report: this iteration's, and from the second evaluation on a quarter from the baseline.

    The last iteration has no training samples; a quarter then shows those of the iteration before.
    """
    limit, iteration = stage.settings.table_rows, stage.iteration or 0
    first = min((row["iteration"] for row in past.samples if row["split"] == "eval"), default=None)
    kept = [row for row in past.samples if row["split"] == "eval" and row["iteration"] == first]
    kept = [] if first == iteration else kept[: limit // 4]
    if "train" not in tables:
        kept += [row for row in past.samples if row["split"] == "train"][: limit // 4]
    room = (limit - len(kept)) // max(1, len(tables))
    seen = frozenset(row["prompt_id"] for row in kept if row["split"] == "eval")
    found = list(kept)
    for table in tables.values():
        chosen = samples.choose(table, room, seed=stage.context.seed, prefer=seen)
        found += samples.rows(table, chosen, iteration=iteration, characters=stage.settings.table_characters)
    return found


def _write(
    stage: Stage[EvaluateSettings],
    record: Record,
    records: list[Record],
    prompts: dict[str, Any],
    rows: list[samples.Row],
) -> dict[str, Path]:
    folder = stage.work_dir
    page = Report(
        fine_tune=stage.context.fine_tune, run=stage.context.run, iteration=record.iteration, policy=record.policy,
        created=record.created, records=records, samples=rows, judged_by=_judged_by(stage, rows),
    )  # fmt: skip
    texts = {
        PROMPTS_FILE: json.dumps(prompts, allow_nan=False),
        SAMPLES_FILE: json.dumps(rows, allow_nan=False),
        REPORT_FILE: render(page),
        SUMMARY_FILE: markdown(stage.context.fine_tune, records),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    history.save(records, folder / history.FILE)
    return {name: folder / name for name in (*texts, history.FILE)}


def _judged_by(stage: Stage[EvaluateSettings], rows: list[samples.Row]) -> str:
    name = stage.settings.correct_reward or (next(iter(rows[-1]["rewards"]), "the reward") if rows else "the reward")
    return f"A sample whose {name} is at least {stage.settings.correct_threshold:g}. One without a reward is wrong."


def _track(
    stage: Stage[EvaluateSettings], records: list[Record], settings: dict[str, Any], files: Mapping[str, Path]
) -> None:
    due = stage.settings.track == "every_evaluation" or (
        stage.settings.track == "auto" and not tracking.is_local(stage.context)
    )
    if due:
        tracking.sync(stage.context, records=[record.model_dump() for record in records], settings=settings,
                      artifacts=[files[REPORT_FILE], files[history.FILE]])  # fmt: skip


def _hand_out(manifest: Manifest, targets: Mapping[str, Path]) -> None:
    """Report and summary come from the artifact itself, so that a stage that had finished before hands out the same."""
    folder = next(iter(targets.values())).parent
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{name}-{manifest.digest[-12:]}"
        fetch(open_store(manifest.store), manifest, scratch, [name], own=True)
        (scratch / name).replace(target)
        scratch.rmdir()

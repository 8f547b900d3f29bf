"""Publish: accepts or rejects a policy against the champion, records why, and offers an accepted one."""

import json
import logging
from pathlib import Path
from typing import Any

from components.common import champion, tracking
from components.common.artifacts import fetch
from components.common.champion import Champion
from components.common.errors import ArtifactNotFound, StageError
from components.common.manifest import Manifest, manifest_key, now
from components.common.stage import Stage, run_stage
from components.common.store import open_store
from components.publish import export
from components.publish.config import PublishSettings
from components.publish.decide import Contender, Rule, decide
from components.publish.summary import markdown

log = logging.getLogger("grpo")

DECISION_FILE, SUMMARY_FILE = "decision.json", "decision.md"


def run(settings: str, policy: Path, evaluation: Path, decision: Path, summary: Path) -> None:
    """Accepts or rejects the run's last policy against the champion of the fine-tune.

    settings: JSON text, or a file of it, with the sections "run" and "stage".
    policy: manifest of the candidate.
    evaluation: manifest of its evaluation.
    decision: manifest written: decision.json, decision.md.
    summary: Markdown text written.
    """
    stage = Stage(
        "publish",
        PublishSettings,
        settings,
        inputs={"policy": policy, "evaluation": evaluation},
        outputs={"decision": decision},
    )
    run_stage(stage, _publish)
    manifest = Manifest.load(decision)
    scratch = Path(summary).with_name(f".{Path(summary).name}-{manifest.digest[-12:]}")
    fetch(open_store(manifest.store), manifest, scratch, [SUMMARY_FILE], own=True)
    (scratch / SUMMARY_FILE).replace(summary)
    scratch.rmdir()


def _publish(stage: Stage[PublishSettings]) -> None:
    stage.settings.check_export_dir()
    folder = stage.fetch("evaluation")
    prompts, records = (json.loads((folder / name).read_text()) for name in ("prompts.json", "history.json"))
    present = champion.read(stage.store, stage.context.fine_tune)
    repeated = present if present and _made_by(present, stage) else None
    outcome = dict(repeated.decision) if repeated else _outcome(stage, prompts, records["records"], present)
    log.info("%s: %s", "accepted" if outcome["accepted"] else "rejected", outcome["reason"])
    standing = present
    if outcome["accepted"] and not repeated:  # first of all: another run may have been quicker
        standing = _pointer(stage, outcome)
        champion.write(stage.store, stage.context.fine_tune, standing, after=present)
    if outcome["accepted"]:
        export.export(stage.manifest("policy"), stage.settings.export_dir)
    outcome["mlflow"] = _track(stage, records["records"], folder, standing)
    _record(stage, outcome)


def _outcome(
    stage: Stage[PublishSettings], prompts: dict[str, Any], records: list[dict[str, Any]], present: Champion | None
) -> dict[str, Any]:
    candidate = _candidate(stage, prompts)
    rival = _champion(stage, present) if present else _baseline(stage, prompts, records, candidate)
    return decide(candidate, rival, _rule(stage)).dump() | {"previous_champion": present.manifest if present else None}


def _rule(stage: Stage[PublishSettings]) -> Rule:
    chosen = stage.settings
    return Rule(
        metric=chosen.metric,
        min_improvement=chosen.min_improvement,
        require_significance=chosen.require_significance,
        resamples=chosen.bootstrap_samples,
        seed=stage.context.seed,
    )


def _made_by(present: Champion, stage: Stage[PublishSettings]) -> bool:
    """The champion is this very candidate: an earlier try of this task was ended after it had moved the pointer."""
    ours = (_key(stage.manifest("evaluation"), "evaluation"), stage.manifest("policy").digest)
    return (present.evaluation, present.digest) == ours and bool(present.decision)


def _key(manifest: Manifest, name: str) -> str:
    return manifest_key(manifest.fine_tune, manifest.run, manifest.iteration, name)


def _candidate(stage: Stage[PublishSettings], prompts: dict[str, Any]) -> Contender:
    """The candidate as its evaluation describes it.

    Raises:
        StageError: the evaluation is of another policy, or has not the metric.
    """
    policy, evaluation, metric = stage.manifest("policy"), stage.manifest("evaluation"), stage.settings.metric
    if evaluation.parents.get("policy") != policy.digest:
        raise StageError(
            f"the evaluation is of policy {evaluation.parents.get('policy')}, not of {policy.digest}: "
            "give publish the evaluation of the policy it is to judge"
        )
    if metric not in evaluation.metrics:
        known = ", ".join(sorted(evaluation.metrics)) or "none: no held-out prompts were sampled from this policy"
        raise StageError(f"publish.metric = {metric!r} is not among the evaluation's metrics: {known}")
    return Contender(
        role="candidate", digest=policy.digest, iteration=policy.iteration or 0, run=policy.run,
        value=evaluation.metrics[metric], low=evaluation.metrics.get(f"{metric}_low"),
        high=evaluation.metrics.get(f"{metric}_high"),
        per_prompt=prompts.get("latest", {}).get("values", {}).get(metric),
    )  # fmt: skip


def _champion(stage: Stage[PublishSettings], present: Champion) -> Contender:
    """The champion by the metric in question, from its own evaluation.

    Raises:
        StageError: it was never measured by this metric.
    """
    metric = stage.settings.metric
    metrics, values = {present.metric: present.value}, {}
    try:
        evaluation = Manifest.parse(stage.store.get_bytes(present.evaluation), where=present.evaluation)
        folder = stage.fetch_manifest(evaluation, "champion", ["prompts.json"])
        metrics |= evaluation.metrics
        values = json.loads((folder / "prompts.json").read_text()).get("latest", {}).get("values", {})
    except ArtifactNotFound as error:
        log.warning("the champion's evaluation is gone (%s): no comparison prompt by prompt", error)
    if metric not in metrics:
        raise StageError(f"the champion was not measured by publish.metric = {metric!r}; it has {', '.join(metrics)}")
    return Contender(
        role="champion", digest=present.digest, iteration=present.iteration, run=present.run, value=metrics[metric],
        low=metrics.get(f"{metric}_low"), high=metrics.get(f"{metric}_high"), per_prompt=values.get(metric),
    )  # fmt: skip


def _baseline(
    stage: Stage[PublishSettings], prompts: dict[str, Any], records: list[dict[str, Any]], candidate: Contender
) -> Contender | None:
    """The fine-tune's first policy that was measured by the metric, before the candidate; None when there is none."""
    metric = stage.settings.metric
    measured = [record for record in records if metric in record["metrics"]]
    first = measured[0] if measured else None
    if first is None or first["iteration"] >= candidate.iteration:
        return None
    metrics = first["metrics"]
    return Contender(
        role="baseline", digest=first["policy"], iteration=first["iteration"], run=first["run"], value=metrics[metric],
        low=metrics.get(f"{metric}_low"), high=metrics.get(f"{metric}_high"),
        per_prompt=prompts.get("baseline", {}).get("values", {}).get(metric),
    )  # fmt: skip


def _pointer(stage: Stage[PublishSettings], outcome: dict[str, Any]) -> Champion:
    policy, evaluation, candidate = stage.manifest("policy"), stage.manifest("evaluation"), outcome["candidate"]
    return Champion(
        manifest=_key(policy, "policy"),
        digest=policy.digest,
        evaluation=_key(evaluation, "evaluation"),
        evaluation_digest=evaluation.digest,
        run=policy.run,
        iteration=policy.iteration or 0,
        metric=outcome["rule"]["metric"],
        value=candidate["value"],
        low=candidate["low"],
        high=candidate["high"],
        accepted=now().isoformat(),
        dataset_digest=_dataset_digest(stage),
        previous=outcome["previous_champion"],
        decision=outcome,
    )


def _dataset_digest(stage: Stage[PublishSettings]) -> str | None:
    """Content of the data set this run was trained on."""
    key = manifest_key(stage.context.fine_tune, stage.context.run, None, "prompts")
    try:
        return Manifest.parse(stage.store.get_bytes(key), where=key).metadata.get("dataset_digest")
    except ArtifactNotFound:  # a policy judged outside a pipeline run
        return None


def _track(
    stage: Stage[PublishSettings], records: list[dict[str, Any]], folder: Path, standing: Champion | None
) -> dict[str, Any] | None:
    """Brings MLflow up to date. The champion is a version that the alias `champion` points to.

    That is so whoever made it champion: one that MLflow was not told of, since it was down, is made up for.
    """
    return tracking.sync(
        stage.context, records=records, settings=stage.run_settings(),
        artifacts=[folder / "report.html", folder / "history.json"],
        model=_model(stage, standing) if standing else None, finished=True,
    )  # fmt: skip


def _model(stage: Stage[PublishSettings], standing: Champion) -> tracking.Model | None:
    try:
        policy = Manifest.parse(stage.store.get_bytes(standing.manifest), where=standing.manifest)
    except ArtifactNotFound as error:
        log.warning("the champion's policy is gone (%s): not registered", error)
        return None
    tags = {
        "grpo.fine_tune": policy.fine_tune,
        "grpo.run": policy.run,
        "grpo.iteration": str(policy.iteration or 0),
        "grpo.metric": tracking.metric_name(standing.metric),
        "grpo.value": f"{standing.value:.6g}",
        "grpo.low": str(standing.low),
        "grpo.high": str(standing.high),
        "grpo.store": policy.store,
        "grpo.evaluation": standing.evaluation_digest,
        "grpo.previous": str(standing.previous),
    }
    tags |= {f"grpo.parent.{role}": digest for role, digest in policy.parents.items()}
    name = stage.settings.registered_model or stage.context.fine_tune
    return tracking.Model(name, policy, standing.manifest, tags)


def _record(stage: Stage[PublishSettings], outcome: dict[str, Any]) -> None:
    decision, summary = stage.work_dir / DECISION_FILE, stage.work_dir / SUMMARY_FILE
    decision.write_text(json.dumps(outcome, indent=1, allow_nan=False) + "\n")
    summary.write_text(markdown(stage.context.fine_tune, outcome))
    metrics = {"accepted": float(outcome["accepted"]), "candidate": outcome["candidate"]["value"]}
    if outcome["difference"]:
        metrics["improvement"] = outcome["difference"]["value"]
    stage.publish(
        "decision",
        kind="decision",
        files={DECISION_FILE: decision, SUMMARY_FILE: summary},
        metrics=metrics,
        metadata={"accepted": outcome["accepted"], "reason": outcome["reason"]},
    )

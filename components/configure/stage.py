"""Configure: every setting checked before a GPU is asked for, and the policy the run starts from."""

import json
import logging
from pathlib import Path
from typing import Any

from components.common.errors import AlreadyPublished, SettingsError
from components.common.manifest import SCORED_BEFORE, Manifest
from components.common.settings import dump_stage, validate
from components.common.stage import Stage, run_stage
from components.common.store import Store, open_store
from components.configure import start
from components.configure.config import STAGE_SECTIONS, RunSettings
from components.configure.form import overlay
from components.configure.pods import Form, by_stage

log = logging.getLogger("grpo")


def run(
    settings: str,
    parameters: str,
    run: str,
    job_id: str,
    policy: Path,
    optimizer: Path,
    reference: Path,
    history: Path,
    dataset_settings: Path,
    rollout_settings: Path,
    reward_settings: Path,
    update_settings: Path,
    evaluate_settings: Path,
    publish_settings: Path,
    run_settings: Path,
    pods: str = "{}",
) -> None:
    """Checks the run's settings and resolves them a stage; publishes the start policy.

    settings: the settings file as JSON, as the pipeline was compiled with; `cluster` is for the pipeline alone.
    parameters: JSON object, dotted setting name -> value, laid over them.
    run: name of the run; blank: job_id.
    policy, optimizer, reference, history: manifests written; optimizer and history have no files at a fresh start.
    pods: JSON object, values of the form's fields of pods by their names, to be checked; blank ones: there are none.
    *_settings: files that get each stage's settings as JSON; run_settings: all of the run's, resolved.
    """
    given = {section: value for section, value in json.loads(settings).items() if section != "cluster"}
    resolved = _checked(overlay(given, json.loads(parameters), RunSettings), by_stage(json.loads(pods)))
    resolved.publish.check_export_dir()  # better now than after the last iteration
    name = (run or job_id).lower()
    store = open_store(resolved.store)
    begin = _find_start(resolved, store, name)
    first = begin.policy.iteration or 0 if begin else 0
    context = resolved.context(run=name, first_iteration=first)
    stage = Stage(
        "configure", RunSettings, dump_stage(context, resolved), inputs={}, iteration=0, rests_on=start.RESTS_ON,
        outputs={"policy": policy, "optimizer": optimizer, "reference": reference, "history": history},
    )  # fmt: skip
    run_stage(stage, lambda stage: _publish(stage, begin))
    _note_settings(stage)
    resolved = _filled_in(resolved)
    files = (dataset_settings, rollout_settings, reward_settings, update_settings, evaluate_settings, publish_settings)
    for section, path in zip(STAGE_SECTIONS, files, strict=True):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(dump_stage(context, getattr(resolved, section)))
    Path(run_settings).write_text(resolved.model_dump_json())


def _checked(values: dict[str, Any], pods: dict[str, Any]) -> RunSettings:
    """The run's settings; all problems of theirs and of the pods' at once."""
    problems = []
    for model, given in ((Form, {"cluster": pods}), (RunSettings, values)):
        try:
            resolved = validate(model, given)
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))
    return resolved


def _filled_in(settings: RunSettings) -> RunSettings:
    """What one stage needs to know of another's settings."""
    room = settings.dataset.max_completion_length or settings.rollout.max_completion_length
    dataset = settings.dataset.model_copy(update={"max_completion_length": room})
    return settings.model_copy(update={"dataset": dataset})


def _find_start(settings: RunSettings, store: Store, name: str) -> start.Start | None:
    if settings.start_from == "base":
        return None
    kept = start.taken_up(store, settings, name)
    if kept:
        return kept
    if settings.start_from == "latest":
        return start.latest(store, settings.fine_tune, but_run=name, run=settings.start_run)
    return start.champion(store, settings.fine_tune)


def _publish(stage: Stage[RunSettings], begin: start.Start | None) -> None:
    settings = stage.settings
    _warn_of_cut_sampling(settings)
    told = _told(settings)
    if begin is None:
        files = start.model_files(settings.model, stage.work_dir)
        metadata = start.describe(files) | {"model": settings.model}
        _check_context(settings, metadata)
        log.info("base model %s: %s, %d files", settings.model, metadata["architecture"], len(files))
        policy = stage.publish("policy", kind="policy", files=files, metadata=metadata)
        stage.publish("reference", kind="policy", reuse=policy.files, metadata=metadata)
        stage.publish("optimizer", kind="optimizer")
        stage.publish("history", kind="evaluation", metadata=told)
        return
    metadata = begin.policy.metadata | {SCORED_BEFORE: start.scored_before(stage.store, begin.policy)}
    _check_context(settings, metadata)
    log.info("going on from policy %s of run %s", begin.policy.iteration, begin.policy.run)
    stage.publish("policy", kind="policy", reuse=begin.policy.files, metadata=metadata)
    reference = begin.reference or begin.policy
    stage.publish("reference", kind="policy", reuse=reference.files, metadata=reference.metadata)
    optimizer, history = begin.optimizer, begin.history
    stage.publish("optimizer", kind="optimizer", reuse=optimizer.files if optimizer else (),
                  metadata=optimizer.metadata if optimizer else {})  # fmt: skip
    stage.publish("history", kind="evaluation", reuse=history.files if history else (),
                  metadata=(history.metadata if history else {}) | told)  # fmt: skip


def _told(settings: RunSettings) -> dict[str, Any]:
    """What evaluate and publish log as params, and what a repeated `configure` knows its start by."""
    return {"settings": settings.model_dump(mode="json")}


def _note_settings(stage: Stage[RunSettings]) -> None:
    """The start stays when other settings are mended, and so may what is noted of them; its content is the same.

    Raises:
        AlreadyPublished: another run has this name, and reports those it was started with.
    """
    history, policy = (Manifest.load(Path(stage.outputs[role])) for role in ("history", "policy"))
    told = _told(stage.settings)
    if history.metadata["settings"] != told["settings"]:
        _check_context(stage.settings, policy.metadata)
        if stage.producer.key not in stage.events.own_keys():
            raise AlreadyPublished(
                f"run {stage.context.run} of fine-tune {stage.context.fine_tune} was started with other settings: "
                "give this run another name, or the settings of that one"
            )
        changed = history.model_copy(update={"metadata": history.metadata | told})
        stage.store.put_bytes(changed.dump(), stage.key("history"))
        Path(stage.outputs["history"]).write_bytes(changed.dump())


def _warn_of_cut_sampling(settings: RunSettings) -> None:
    """Where the update would compare the sampler's cut distribution with its own whole one."""
    rollout = settings.rollout
    if rollout.top_p < 1 or rollout.top_k is not None:
        log.warning(
            "rollout.top_p = %g, top_k = %s: log-probabilities of samples are of the cut distribution, those of the "
            "update of the whole one, so its correction is biased; leave both open for training",
            rollout.top_p, rollout.top_k,
        )  # fmt: skip


def _check_context(settings: RunSettings, model: dict[str, Any]) -> None:
    context, prompt = model.get("max_position_embeddings"), settings.dataset.max_prompt_length or 1
    completion = settings.rollout.max_completion_length
    if context and prompt + completion > context:
        raise SettingsError(
            f"dataset.max_prompt_length = {prompt} and rollout.max_completion_length = {completion} exceed the model's "
            f"context of {context} tokens; lower one of them by {prompt + completion - context}"
        )

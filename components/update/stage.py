"""The update stage: from a policy and its scored rollouts to the next policy."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.manifest import File, Manifest, content_digest
from components.common.patched import upload_policy
from components.common.stage import Stage, run_stage
from components.update.config import UpdateSettings

if TYPE_CHECKING:
    from components.update.batching import Batch

log = logging.getLogger("grpo")

POLICY_NAME, OPTIMIZER_NAME = "policy", "optimizer"
"""Names of the outputs in the store, the same ones the start policy and the empty optimizer state have."""


def run(
    settings: str,
    iteration: int,
    policy: Path,
    optimizer: Path,
    reference: Path,
    scored: Path,
    next_policy: Path,
    next_optimizer: Path,
) -> None:
    """Updates a policy on its scored rollouts.

    settings: this stage's settings as configure writes them: JSON, or a file of it.
    iteration: iteration of the run, from 0.
    policy, optimizer: manifests of the policy to update and of its optimizer state (without files at a fresh start).
    reference: manifest of the reference policy; fetched only when beta is above 0.
    scored: manifest of the completions this policy sampled, with their rewards.
    next_policy, next_optimizer: manifests written; the update's figures are the next policy's metrics.
    """
    stage = Stage(
        name="update", model=UpdateSettings, settings_text=settings, iteration=iteration, output_offset=1,
        inputs={"policy": policy, "optimizer": optimizer, "reference": reference, "scored": scored},
        outputs={"next_policy": next_policy, "next_optimizer": next_optimizer},
        names={"next_policy": POLICY_NAME, "next_optimizer": OPTIMIZER_NAME},
    )  # fmt: skip
    run_stage(stage, _update)


def _update(stage: Stage[UpdateSettings]) -> None:
    from components.update import nodes

    if stage.settings.nodes > 1 and nodes.count() == 1:
        from components.update import trainjob

        trainjob.run(stage)
        return
    from components.update import inputs
    from components.update.health import unchecked
    from components.update.launch import Preload, launch

    preload = Preload()
    try:
        folder = inputs.fetch_policy(stage)
        batch, figures = inputs.read(stage, folder)
        merging = inputs.merges(stage) and inputs.has_adapter(stage.manifest("policy"))  # even without a step
        idle = not batch.keep.any() and not merging
        if not idle:
            job = inputs.prepare(stage, folder)
            batch.save(stage.work_dir / "batch.npz")
    finally:
        preload.wait()
    if not batch.keep.any():
        log.warning("%s: no completion has a signal (%s): no optimizer step", stage.task, _why(batch, figures))
    if idle:
        _publish_unchanged(stage, figures)
        return
    result = launch(stage.work_dir, job)
    state = _files(stage.work_dir / "next" / "optimizer")
    if result is None:
        nodes.hand_over(stage, state)
    else:
        if missing := unchecked(stage.settings, result.metrics):
            log.warning("%s: nothing to check %s with", stage.task, ", ".join(missing))
        counts = {"global_step": result.global_step, "num_skipped": result.num_skipped}
        _publish(stage, figures | result.metrics, counts, state, merged=job.merge)
        nodes.clear(stage)


def _publish(
    stage: Stage[UpdateSettings],
    metrics: dict[str, float],
    counts: dict[str, int],
    state: dict[str, Path],
    *,
    merged: bool,
) -> None:
    """Publishes what the workers left in `next/`.

    counts: optimizer steps of the fine-tune, and those skipped of late.
    state: files of this node's optimizer state.

    Optimizer state first: it names the policy its master weights are of, so a policy never gets another's. What an
    attempt left that was killed between the two is of a policy that nobody has: a GPU makes another one the next time.
    """
    from components.update import inputs, nodes

    target, policy, before = stage.work_dir / "next", stage.manifest("policy"), stage.manifest("optimizer")
    adapter = {f"adapter/{name}": path for name, path in _files(target / "adapter").items()}
    new = _files(target / "policy") | ({} if merged else adapter)
    weights, figures = upload_policy(stage.store, new, policy, stage.work_dir / "policy", stage.settings.delta)
    base = inputs.base_weights(stage) if adapter else []
    files = [*weights, *_carried(policy), *([] if merged else base)]
    digest = content_digest("policy", files)
    stage.withdraw("next_optimizer")
    if inputs.saves_optimizer(stage):
        held = state | (adapter if merged else {})
        metadata: dict[str, Any] = {**counts, "policy_digest": digest}
        if merged:
            metadata["base"] = [file.model_dump() for file in base]
        others = nodes.collect(stage)
        stage.publish("next_optimizer", kind="optimizer", files=held, reuse=others, metadata=metadata)
    else:
        kept = before.files if stage.settings.carry_optimizer else ()
        metadata = before.metadata | counts
        stage.publish("next_optimizer", kind="optimizer", reuse=kept, metadata=metadata)
    metadata = _policy_metadata(stage)
    stage.publish("next_policy", kind="policy", reuse=files, metrics=metrics | figures, metadata=metadata)


def _why(batch: "Batch", figures: dict[str, float]) -> str:
    """Why nothing is trained on."""
    parts = [f"{figures['frac_reward_zero_std']:.0%} of the groups have equal rewards"]
    if masked := int(((batch.scored_lengths == 0) & batch.truncated).sum()):
        parts.append(f"mask_truncated leaves out {masked} of {len(batch.group)} completions that hit the length limit")
    return ", ".join(parts)


def _publish_unchanged(stage: Stage[UpdateSettings], figures: dict[str, float]) -> None:
    """No group carries a signal: the policy stays as it is, and so does the optimizer state."""
    policy, state = stage.manifest("policy"), stage.manifest("optimizer")
    stage.publish("next_optimizer", kind="optimizer", reuse=state.files, metadata=state.metadata)
    metadata = _policy_metadata(stage)
    stage.publish("next_policy", kind="policy", reuse=policy.files, metrics=figures, metadata=metadata)


def _policy_metadata(stage: Stage[UpdateSettings]) -> dict[str, Any]:
    """What is known of the model stays known; a moving reference travels with the policy."""
    from components.update import inputs

    metadata = dict(stage.manifest("policy").metadata)
    if stage.settings.reference_every:
        kept = inputs.reference(stage).model_copy(update={"metadata": {}, "metrics": {}})
        metadata["reference"] = kept.model_dump(mode="json")
    return metadata


def _carried(policy: Manifest) -> list[File]:
    """Files that every policy of a fine-tune shares and of which no byte moves: configuration and tokenizer."""
    from components.update.inputs import is_weights

    return [file for file in policy.files if not is_weights(file.name) and not file.name.startswith("adapter/")]


def _files(folder: Path) -> dict[str, Path]:
    """All files of a folder by relative name; none when there is no folder."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

"""The update stage: from a policy and its scored rollouts to the next policy."""

import json
from pathlib import Path
from typing import Any

from components.common import artifacts
from components.common.errors import DataError, StageError
from components.common.manifest import File, Manifest, content_digest
from components.common.stage import Stage, run_stage
from components.update.config import UpdateSettings

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
    from components.update.launch import Preload

    preload = Preload()
    try:
        policy = stage.manifest("policy")
        folder = stage.fetch("policy", [name for name in policy.names if _is_model_file(name)])
        batch, figures = _prepare(stage, folder)
        if not batch.keep.any():
            _publish_unchanged(stage, figures)
            return
        _fetch_reference(stage)
        job = _job(stage, folder, restore=_fetch_optimizer(stage))
        batch.save(stage.work_dir / "batch.npz")
    finally:
        preload.wait()
    from components.update.launch import launch

    result = launch(stage.work_dir, job)
    _publish(stage, result.metrics | figures, result.global_step)


def _prepare(stage: Stage[UpdateSettings], folder: Path) -> tuple[Any, dict[str, float]]:
    """The batch with its advantages, and the figures known before any model is loaded."""
    from components.update.batching import read_batch
    from components.update.health import check_zero_std_share
    from components.update.weighting import add_signal

    policy, settings = stage.manifest("policy"), stage.settings
    allowed = [policy.digest]
    if stage.context.staleness and "policy" in policy.parents:
        allowed.append(policy.parents["policy"])
    batch = read_batch(
        stage.fetch("scored"), policy_digests=allowed, vocabulary_size=_vocabulary_size(folder),
        reward_columns=settings.reward_combination == "normalize_then_sum",
    )  # fmt: skip
    batch, figures = add_signal(batch, settings, _sampling(stage, "max_completion_length"))
    check_zero_std_share(settings, figures["frac_reward_zero_std"])
    return batch, figures


def _job(stage: Stage[UpdateSettings], folder: Path, restore: str) -> Any:
    from components.update.job import Job
    from components.update.policy import stored_dtype

    settings = stage.settings
    device = _device(settings)
    dtype = {"cpu": "float32", "cuda": "bfloat16"}[device] if settings.dtype == "auto" else settings.dtype
    if dtype == "bfloat16" and settings.zero_stage == 0:
        raise StageError('zero_stage = 0 adds gradients up in bfloat16; set zero_stage = 1, or dtype = "float32"')
    return Job(
        settings=settings, seed=stage.context.seed + (stage.iteration or 0),
        temperature=_sampling(stage, "temperature"), max_completion_length=_sampling(stage, "max_completion_length"),
        global_step=int(stage.manifest("optimizer").metadata.get("global_step", 0)), device=device, dtype=dtype,
        publish_dtype=stored_dtype(folder) if settings.publish_dtype == "auto" else settings.publish_dtype,
        restore=restore, save_optimizer=_saves_optimizer(stage),
    )  # fmt: skip


def _fetch_reference(stage: Stage[UpdateSettings]) -> None:
    """The reference model, only where the loss or the reward needs it."""
    if stage.settings.beta > 0:
        reference = stage.manifest("reference")
        stage.fetch("reference", [name for name in reference.names if _is_model_file(name)])


def _fetch_optimizer(stage: Stage[UpdateSettings]) -> str:
    """Brings the optimizer state; tells what of it fits: master weights only when they are this very policy's."""
    state = stage.manifest("optimizer")
    if not state.files or not stage.settings.carry_optimizer:
        return "nothing"
    stage.fetch("optimizer")
    return "all" if state.metadata.get("policy_digest") == stage.manifest("policy").digest else "moments"


def _saves_optimizer(stage: Stage[UpdateSettings]) -> bool:
    """Whether this iteration's state is published; the run's last is, so that the next run can go on from it."""
    assert stage.iteration is not None
    done = stage.iteration + 1
    due = done % stage.settings.optimizer_every == 0 or done == stage.context.last_iteration
    return stage.settings.carry_optimizer and due


def _publish(stage: Stage[UpdateSettings], metrics: dict[str, float], global_step: int) -> None:
    """Optimizer state first: it says which policy its master weights are of, so a policy never has wrong ones."""
    target = stage.work_dir / "next"
    weights = artifacts.upload(stage.store, _files(target / "policy"))
    files = [*weights, *_carried(stage.manifest("policy"))]
    metadata = {"global_step": global_step, "policy_digest": content_digest("policy", files)}
    if _saves_optimizer(stage):
        stage.publish("next_optimizer", kind="optimizer", files=_files(target / "optimizer"), metadata=metadata)
    else:
        _pass_on_optimizer(stage, global_step)
    metadata = stage.manifest("policy").metadata
    stage.publish("next_policy", kind="policy", reuse=files, metrics=metrics, metadata=metadata)


def _publish_unchanged(stage: Stage[UpdateSettings], figures: dict[str, float]) -> None:
    """No group carries a signal: the policy stays as it is, and so does the optimizer state."""
    policy, state = stage.manifest("policy"), stage.manifest("optimizer")
    stage.publish("next_optimizer", kind="optimizer", reuse=state.files, metadata=state.metadata)
    stage.publish("next_policy", kind="policy", reuse=policy.files, metrics=figures, metadata=policy.metadata)


def _pass_on_optimizer(stage: Stage[UpdateSettings], global_step: int) -> None:
    state = stage.manifest("optimizer")
    files = state.files if stage.settings.carry_optimizer else ()
    metadata = state.metadata | {"global_step": global_step}
    stage.publish("next_optimizer", kind="optimizer", reuse=files, metadata=metadata)


def _carried(policy: Manifest) -> list[File]:
    """Files every policy of a fine-tune shares: configuration and tokenizer; no byte of them moves."""
    from components.update.policy import is_weights

    return [file for file in policy.files if not is_weights(file.name)]


def _is_model_file(name: str) -> bool:
    """Files the model is loaded from; tokenizer files stay where they are."""
    return name in ("config.json", "generation_config.json") or ".safetensors" in name


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _vocabulary_size(folder: Path) -> int:
    try:
        return int(json.loads((folder / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError):
        raise DataError("the policy has no config.json with a vocab_size; start from a causal language model") from None


def _sampling(stage: Stage[UpdateSettings], name: str) -> Any:
    """A sampling parameter the rollout was made with."""
    try:
        return stage.manifest("scored").metadata["sampling"][name]
    except KeyError:
        raise DataError(f"the scored rollout does not say its sampling {name}; sample the iteration again") from None


def _device(settings: UpdateSettings) -> str:
    """GPUs when there are any; counted without starting CUDA in this process."""
    if settings.device != "auto":
        return settings.device
    import torch

    return "cuda" if torch.cuda.device_count() else "cpu"

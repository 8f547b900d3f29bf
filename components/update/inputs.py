"""What the stage fetches and checks before any model is loaded."""

import json
from pathlib import Path
from typing import Any

from components.common.errors import DataError, SettingsError
from components.common.manifest import File, Manifest
from components.common.stage import Stage
from components.update.batching import Batch, read_batch
from components.update.config import AUTOMATIC_TOKENS, UpdateSettings
from components.update.health import check_zero_std_share
from components.update.job import Job
from components.update.policy import stored_dtype
from components.update.weighting import add_advantages, shape_rewards

UpdateStage = Stage[UpdateSettings]


def fetch_policy(stage: UpdateStage) -> Path:
    """Brings what the policy is loaded from: weights, configuration, an adapter; no tokenizer."""
    policy = stage.manifest("policy")
    return stage.fetch("policy", [name for name in policy.names if is_model_file(name)])


def read(stage: UpdateStage, folder: Path) -> tuple[Batch, dict[str, float]]:
    """The batch with its advantages, and the figures known before any model is loaded."""
    policy, scored, settings = stage.manifest("policy"), stage.manifest("scored"), stage.settings
    if has_adapter(policy) and not settings.lora.rank:
        raise DataError(
            "the policy is an adapter on base weights and lora.rank is 0: set lora.rank and lora.alpha as they were to "
            "go on with it, or start from a run's last policy, which is merged"
        )
    allowed = [policy.digest]
    if stage.context.staleness and "policy" in policy.parents:
        allowed.append(policy.parents["policy"])
    columns = settings.reward_combination == "normalize_then_sum"
    completions = stage.fetch("scored", [name for name in scored.names if name.startswith("train")])
    batch = read_batch(
        completions, policy_digests=allowed, vocabulary_size=vocabulary_size(folder), reward_columns=columns
    )
    weights = tuple(float(entry["weight"]) for entry in scored.metadata.get("rewards", ())) if columns else ()
    batch = shape_rewards(batch, settings, sampling(stage, "max_completion_length"))
    needs_all = settings.algorithm == "ppo" or (settings.beta > 0 and settings.kl_in == "reward")
    batch, figures = add_advantages(batch, settings, weights, keep_all=needs_all)
    check_zero_std_share(settings, figures["frac_reward_zero_std"])
    return batch, figures


def prepare(stage: UpdateStage, folder: Path) -> Job:
    """Fetches reference, optimizer state and adapter where they are needed; gives the workers' job."""
    settings = stage.settings
    adapter, base_is_reference = _fetch_adapter(stage) if settings.lora.rank else ("none", False)
    if settings.beta > 0 and not base_is_reference:
        manifest = reference(stage)
        stage.fetch_manifest(manifest, "reference", [name for name in manifest.names if is_model_file(name)])
    restore = _fetch_optimizer(stage, fresh_adapter=adapter == "fresh")
    device, dtype = _place(settings)
    before = stage.manifest("optimizer").metadata
    if settings.max_tokens_per_microbatch == "auto":
        settings = settings.model_copy(update={"max_tokens_per_microbatch": AUTOMATIC_TOKENS[device]})
    return Job(
        settings=settings, seed=stage.context.seed + (stage.iteration or 0), temperature=sampling(stage, "temperature"),
        max_completion_length=sampling(stage, "max_completion_length"),
        global_step=int(before.get("global_step", 0)), num_skipped=int(before.get("num_skipped", 0)),
        device=device, dtype=dtype,
        publish_dtype=stored_dtype(folder) if settings.publish_dtype == "auto" else settings.publish_dtype,
        restore=restore, save_optimizer=saves_optimizer(stage), adapter=adapter, merge=merges(stage),
        adapter_off_is_reference=base_is_reference,
    )  # fmt: skip


def reference(stage: UpdateStage) -> Manifest:
    """The reference: the fine-tune's start, or the policy of the last iteration that `reference_every` divides."""
    every, policy = stage.settings.reference_every, stage.manifest("policy")
    if every and (stage.iteration or 0) % every == 0:
        return policy
    kept = policy.metadata.get("reference") if every else None
    return stage.manifest("reference") if kept is None else Manifest.model_validate(kept)


def saves_optimizer(stage: UpdateStage) -> bool:
    """Whether this iteration's state is published; the run's last is, so that the next run can go on from it."""
    done = (stage.iteration or 0) + 1
    due = done % stage.settings.optimizer_every == 0 or done == stage.context.last_iteration
    return stage.settings.carry_optimizer and due


def merges(stage: UpdateStage) -> bool:
    """Whether the next policy has merged weights: always, or as the run's last."""
    done, lora = (stage.iteration or 0) + 1, stage.settings.lora
    return lora.rank > 0 and (lora.publish == "merged" or done == stage.context.last_iteration)


def has_adapter(policy: Manifest) -> bool:
    """Whether a policy is an adapter beside base weights."""
    return any(name.startswith("adapter/") for name in policy.names)


def base_weights(stage: UpdateStage) -> list[File]:
    """Weights under the adapter: the policy's own, or, of a merged policy, those the optimizer state remembers."""
    policy, state = stage.manifest("policy"), stage.manifest("optimizer")
    if _adapter_beside_optimizer(policy, state):
        return [File.model_validate(entry) for entry in state.metadata["base"]]
    return [file for file in policy.files if is_weights(file.name)]


def is_weights(name: str) -> bool:
    """Whether a policy's file holds the model's weights; an adapter is a folder of its own."""
    return "/" not in name and ".safetensors" in name


def is_model_file(name: str) -> bool:
    """Files the model is loaded from."""
    return name in ("config.json", "generation_config.json") or is_weights(name) or name.startswith("adapter/")


def sampling(stage: UpdateStage, name: str) -> Any:
    """A sampling parameter the rollout was made with."""
    try:
        return stage.manifest("scored").metadata["sampling"][name]
    except KeyError:
        raise DataError(f"the scored rollout does not say its sampling {name}; sample the iteration again") from None


def vocabulary_size(folder: Path) -> int:
    """Rows of the policy's embedding, from its configuration."""
    try:
        return int(json.loads((folder / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError):
        raise DataError("the policy has no config.json with a vocab_size; start from a causal language model") from None


def _fetch_adapter(stage: UpdateStage) -> tuple[str, bool]:
    """Brings the adapter to `adapter/`; tells whether there was one, and whether its base is the reference model."""
    policy, state = stage.manifest("policy"), stage.manifest("optimizer")
    beside = _adapter_beside_optimizer(policy, state)
    if beside:
        changed = policy.model_copy(update={"files": tuple(base_weights(stage))})
        stage.fetch_manifest(changed, "policy")
        stage.fetch_manifest(state, ".", [name for name in state.names if name.startswith("adapter/")])
    elif has_adapter(policy):
        stage.fetch_manifest(policy, ".", [name for name in policy.names if name.startswith("adapter/")])
    else:
        return "fresh", _same_weights(stage, policy.files)
    return "carried", _same_weights(stage, base_weights(stage))


def _adapter_beside_optimizer(policy: Manifest, state: Manifest) -> bool:
    """Of a merged policy, adapter and base are kept with the optimizer state that was published with it."""
    return "base" in state.metadata and state.metadata.get("policy_digest") == policy.digest


def _same_weights(stage: UpdateStage, files: Any) -> bool:
    """Whether the reference model's weights are exactly these files."""
    other = reference(stage)
    if has_adapter(other):
        return False
    digests = [{file.digest for file in group if is_weights(file.name)} for group in (files, other.files)]
    return digests[0] == digests[1]


def _fetch_optimizer(stage: UpdateStage, *, fresh_adapter: bool) -> str:
    """Brings the optimizer state; tells what of it fits: master weights only when they are this very policy's."""
    state = stage.manifest("optimizer")
    if not state.files or not stage.settings.carry_optimizer or fresh_adapter:
        return "nothing"
    stage.fetch("optimizer", [name for name in state.names if not name.startswith("adapter/")])
    return "all" if state.metadata.get("policy_digest") == stage.manifest("policy").digest else "moments"


def _place(settings: UpdateSettings) -> tuple[str, str]:
    """Device and type to train in; GPUs are counted without starting CUDA in this process."""
    device = settings.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.device_count() else "cpu"
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype == "bfloat16" and settings.zero_stage == 0:
        raise SettingsError('zero_stage = 0 adds gradients up in bfloat16; set zero_stage = 1, or dtype = "float32"')
    return device, dtype

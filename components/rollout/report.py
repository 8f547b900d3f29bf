"""What a rollout tells about itself: its metrics, and the sampling settings for later stages."""

import logging
from collections.abc import Mapping, Sequence

from components.rollout.config import RolloutSettings
from components.rollout.plan import Group
from components.rollout.resume import Key, Sample

log = logging.getLogger("grpo")


def split_metrics(split: str, groups: Sequence[Group], samples: Mapping[Key, Sequence[Sample]]) -> dict[str, float]:
    """Counts and lengths of one split; lengths in tokens, over the samples that could be drawn."""
    rows = [sample for group in groups for sample in samples[group.key]]
    good = [sample for sample in rows if not sample.failed]
    name = "rollout/" if split == "train" else f"rollout/{split}_"
    metrics = {f"{name}num_completions": float(len(rows)), f"{name}num_failed": float(len(rows) - len(good))}
    if good:
        lengths = [len(sample.completion_ids) for sample in good]
        metrics |= {
            f"{name}num_tokens": float(sum(lengths)),
            f"{name}mean_length": sum(lengths) / len(lengths),
            f"{name}clipped_ratio": sum(sample.finish_reason == "length" for sample in good) / len(good),
        }
    return metrics


def warn_if_truncated(metrics: Mapping[str, float]) -> None:
    """Says so when no training completion came to its end: nothing can be learnt from how they end."""
    if metrics.get("rollout/clipped_ratio") == 1:
        log.warning(
            "every completion was cut at %d tokens: raise rollout.max_completion_length, or check that the policy's "
            "end token is among its stop tokens", int(metrics["rollout/mean_length"]),
        )  # fmt: skip


def sampling_metadata(settings: RolloutSettings) -> dict:
    """The distribution the tokens came from; the update stage divides its logits by the same temperature."""
    return {
        "logprobs": "processed",
        "dtype": settings.dtype,
        "sampling": {
            "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k,
            "max_completion_length": settings.max_completion_length, "group_size": settings.group_size,
        },
        "eval_sampling": {
            "temperature": settings.eval_temperature, "top_p": settings.eval_top_p, "top_k": None,
            "max_completion_length": settings.max_completion_length, "group_size": settings.eval_group_size,
        },
    }  # fmt: skip

"""Memory of the GPU stages, from the model's shape and the settings; `docs/planning.md` has the formulas.

P parameters   T tokens of a micro-batch   W processes   all sizes in bytes
"""

from dataclasses import dataclass

from components.update.config import AUTOMATIC_TOKENS, UpdateSettings
from pipeline.settings import PipelineSettings
from pipeline.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30
HEAD_BUFFER = 192 << 20
"""Logits that exist at once (`components/update/head.py`)."""
BUCKET_VALUES = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`: gradients on their way to the other processes."""
RUNTIME = 1.5 * GIB
"""CUDA context, communication buffers, cuBLAS workspaces of a process: 1 to 2 GiB as seen with torch 2."""


@dataclass(frozen=True)
class Memory:
    """What one process needs, by part, and what a GPU offers."""

    parts: dict[str, float]
    available: float | None
    """Bytes of the GPU; none when its type is unknown."""
    advice: str
    """Which setting to lower when it does not fit."""

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """None when nobody knows the GPU's memory."""
        return None if self.available is None else self.total <= self.available


def update_parts(settings: UpdateSettings, shape: ModelShape, *, on_gpu: bool, processes: int) -> dict[str, float]:
    """Bytes of one process of the update, by part."""
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and on_gpu)
    value, zero = (2 if half else 4), settings.zero_stage
    asked = settings.max_tokens_per_microbatch
    tokens = AUTOMATIC_TOKENS["cuda" if on_gpu else "cpu"] if asked == "auto" else asked
    models = 2 if settings.algorithm == "ppo" else 1
    all_values = models * shape.parameters
    trained = shape.lora(settings.lora.rank) if settings.lora.rank else all_values
    weights = all_values + (trained if settings.lora.rank else 0)
    share = {stage: processes if zero >= stage else 1 for stage in (1, 2, 3)}
    master = 4 * trained / share[1] if half or zero else 0
    parts = {
        "weights": value * weights / share[3],
        "gradients": 4 * trained / share[2],
        "optimizer": master + 8 * trained / share[1],
        "activations": _activations(settings, shape, value, tokens),
        "logits": min(tokens * shape.vocabulary * 4, HEAD_BUFFER),
    }
    if zero:
        parts["buckets"] = value * min(BUCKET_VALUES, trained)
    if settings.offload_optimizer and on_gpu:
        parts["optimizer"] = 0
    if settings.offload_parameters and on_gpu:
        parts["weights"] = value * weights / shape.layers
    if on_gpu:
        parts["runtime"] = RUNTIME
    return parts


def _activations(settings: UpdateSettings, shape: ModelShape, value: int, tokens: int) -> float:
    """Kept for the backward pass of one micro-batch; with checkpointing, each layer's input and one layer's inside."""
    if settings.gradient_checkpointing:
        return tokens * value * (shape.layers * shape.hidden + shape.layer_values)
    return tokens * value * shape.layers * shape.layer_values


def update_memory(settings: PipelineSettings, shape: ModelShape, available: float | None) -> Memory:
    """Of one process of the update stage on the cluster."""
    update, gpus = settings.update, settings.cluster.update.gpus
    each = gpus or 1 if update.num_processes == "auto" else update.num_processes
    parts = update_parts(update, shape, on_gpu=gpus > 0, processes=each * update.nodes)
    return Memory(parts, available, _update_advice(update, parts))


def _update_advice(update: UpdateSettings, parts: dict[str, float]) -> str:
    """What helps most, by which part is the largest."""
    largest = max(parts, key=lambda name: parts[name])
    if largest in ("activations", "logits"):
        if not update.gradient_checkpointing:
            return "set update.gradient_checkpointing = true"
        return f"lower update.max_tokens_per_microbatch (now {update.max_tokens_per_microbatch})"
    if update.zero_stage < 3 and not update.lora.rank:
        return f"set update.zero_stage = 3 (now {update.zero_stage}) and add processes (cluster.update.gpus, nodes)"
    if not update.offload_optimizer and largest == "optimizer":
        return "set update.offload_optimizer = true"
    return "set update.lora.rank = 32, add processes (cluster.update.gpus, update.nodes), or take a larger gpu_type"


def longest(settings: PipelineSettings) -> int:
    """Tokens of the longest sequence a rollout may hold."""
    return (settings.dataset.max_prompt_length or 512) + settings.rollout.max_completion_length


def rollout_width(settings: PipelineSettings) -> int:
    """GPUs one copy of the model is spread over."""
    return settings.rollout.vllm.tensor_parallel_size or max(settings.cluster.rollout.gpus, 1)


def rollout_memory(settings: PipelineSettings, shape: ModelShape, available: float | None) -> Memory:
    """Of one GPU of the rollout: weights, and the cache of at least eight of the longest sequences at once."""
    rollout, width = settings.rollout, rollout_width(settings)
    value = BYTES.get(rollout.dtype, 2)
    parts = {
        "weights": value * shape.parameters / width,
        "cache": 8 * longest(settings) * value * shape.kv_values / width,
        "runtime": RUNTIME,
    }
    usable = None if available is None else available * rollout.vllm.gpu_memory_utilization
    advice = f'raise cluster.rollout.gpus (now {settings.cluster.rollout.gpus}), or rollout.vllm.quantization = "fp8"'
    if parts["cache"] > parts["weights"]:
        advice = f"lower rollout.max_completion_length (now {rollout.max_completion_length})"
    return Memory(parts, usable, advice)


def concurrent_samples(settings: PipelineSettings, shape: ModelShape, memory: Memory) -> int | None:
    """Longest sequences a rollout's GPUs hold at once."""
    if memory.available is None:
        return None
    one = memory.parts["cache"] / 8
    free = memory.available - memory.total + memory.parts["cache"]
    return max(int(free // one), 0)

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
LIVE_VALUES = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: weights of ZeRO 3 that are put together at once."""
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
    reference: float = 0.0
    """What the pass of the reference model needs, which is over before the rest begins."""

    @property
    def total(self) -> float:
        """All parts together, or the reference's pass where that needs more."""
        return max(sum(self.parts.values()), self.reference)

    @property
    def fits(self) -> bool | None:
        """None when nobody knows the GPU's memory."""
        return None if self.available is None else self.total <= self.available


def update_parts(settings: UpdateSettings, shape: ModelShape, *, on_gpu: bool, processes: int) -> dict[str, float]:
    """Bytes of one process of the update, by part."""
    value, zero, tokens = _value_bytes(settings, on_gpu), settings.zero_stage, _tokens(settings, on_gpu)
    models = 2 if settings.algorithm == "ppo" else 1  # the critic is a second model, in one graph with the policy
    all_values = models * shape.parameters
    trained = shape.lora(settings.lora.rank) if settings.lora.rank else all_values
    weights = all_values + (trained if settings.lora.rank else 0)
    share = {stage: processes if zero >= stage else 1 for stage in (1, 2, 3)}
    master = 4 * trained / share[1] if value == 2 or zero else 0
    parts = {
        "weights": value * weights / share[3],
        "gradients": 4 * trained / share[2],
        "optimizer": master + 8 * trained / share[1],
        "activations": models * _activations(settings, shape, value, tokens),
        "logits": min(tokens * shape.vocabulary * 4, HEAD_BUFFER),
    }
    if zero:
        parts["buckets"] = value * min(BUCKET_VALUES, trained)
    if zero == 3:
        parts["gathered"] = value * min(LIVE_VALUES, weights)
    if settings.offload_optimizer and on_gpu:
        parts["optimizer"] = 0
    if settings.offload_parameters and on_gpu:
        parts["weights"] = 0
    if on_gpu:
        parts["runtime"] = RUNTIME
    return parts


def _activations(settings: UpdateSettings, shape: ModelShape, value: int, tokens: int) -> float:
    """Kept for the backward pass of one micro-batch; with checkpointing, each layer's input and one layer's inside."""
    if settings.gradient_checkpointing:
        return tokens * value * (shape.layers * shape.hidden + shape.layer_values)
    return tokens * value * shape.layers * shape.layer_values


def _value_bytes(settings: UpdateSettings, on_gpu: bool) -> int:
    return 2 if settings.dtype == "bfloat16" or (settings.dtype == "auto" and on_gpu) else 4


def _tokens(settings: UpdateSettings, on_gpu: bool) -> int:
    """Of a micro-batch."""
    asked = settings.max_tokens_per_microbatch
    return AUTOMATIC_TOKENS["cuda" if on_gpu else "cpu"] if asked == "auto" else asked


def loads_reference(settings: UpdateSettings) -> bool:
    """Whether a reference model is brought and loaded; under an adapter the base is it, unless the reference moves."""
    return settings.beta > 0 and not (settings.lora.rank and not settings.reference_every)


def reference_pass(settings: UpdateSettings, shape: ModelShape, *, on_gpu: bool, processes: int) -> float:
    """Bytes of one process while the reference scores the batch: all its weights, or under ZeRO 3 its part and what is
    put together of them, and one layer's values of a micro-batch without gradients."""
    if not loads_reference(settings):
        return 0.0
    value, tokens = _value_bytes(settings, on_gpu), _tokens(settings, on_gpu)
    inside = tokens * value * (shape.hidden + shape.layer_values)
    logits = min(tokens * shape.vocabulary * 4, HEAD_BUFFER)
    values = shape.parameters
    if settings.zero_stage == 3:
        part = 0 if settings.offload_parameters and on_gpu else values / processes
        values = part + min(LIVE_VALUES, values)
    return value * values + inside + logits + (RUNTIME if on_gpu else 0.0)


def update_processes(settings: PipelineSettings) -> int:
    """Processes of one node of an update."""
    asked = settings.update.num_processes
    return max(settings.cluster.update.gpus, 1) if asked == "auto" else asked


def update_memory(settings: PipelineSettings, shape: ModelShape, available: float | None) -> Memory:
    """Of one process of the update stage on the cluster."""
    update, on_gpu = settings.update, settings.cluster.update.gpus > 0
    processes = update_processes(settings) * update.nodes
    parts = update_parts(update, shape, on_gpu=on_gpu, processes=processes)
    reference = reference_pass(update, shape, on_gpu=on_gpu, processes=processes)
    return Memory(parts, available, _update_advice(update, parts, reference), reference)


def _update_advice(update: UpdateSettings, parts: dict[str, float], reference: float) -> str:
    """What helps most, by which part is the largest."""
    if reference > sum(parts.values()):
        return "the reference model is loaded whole: set update.zero_stage = 3 or update.beta = 0"
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

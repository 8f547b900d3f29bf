"""What a run will need, before any GPU is asked for: memory, storage traffic, pods, hours and cost.

`docs/planning.md` has the formulas with their sources, and what was measured against them.
"""

from dataclasses import dataclass

from pipeline.compiling import task_count
from pipeline.gpus import Gpu, find_gpu
from pipeline.memory import (
    BYTES,
    GIB,
    Memory,
    concurrent_samples,
    loads_reference,
    longest,
    rollout_memory,
    rollout_width,
    update_memory,
    update_processes,
)
from pipeline.resources import StageResources, quantity
from pipeline.settings import PipelineSettings
from pipeline.shape import ModelShape
from pipeline.submitting import split

MFU = 0.35
"""Share of a GPU's peak that training reaches; 0.3 to 0.5 is usual for dense models of 1 to 70 billion parameters."""
BANDWIDTH_SHARE = 0.6
"""Share of a GPU's memory bandwidth that decoding reaches."""
COMPLETION_SHARE = 0.7
"""Mean length of a completion as a share of the limit."""
COMPLETION_BYTES = 5.6
"""Stored bytes a token of completions: 288 MB for 51.2 million (Parquet, zstd, ids and log-probabilities)."""
DELTA_FACTORS = {1e-6: {1: 121, 8: 30, 16: 20}, 1e-5: {1: 21, 8: 6}}
"""How many times smaller than a full copy a patch is: learning rate → optimizer steps → factor, measured."""


@dataclass(frozen=True)
class Traffic:
    """Bytes through object storage in one iteration."""

    policy: float
    """A full policy."""
    patch: float
    """The same as a patch of the one before."""
    optimizer: float
    """Optimizer state; 0 in iterations that do not publish it."""
    completions: float
    """Completions and rewards."""
    up_full: float
    up_delta: float
    down: float
    """Brought to the stages, when nothing is in a node's cache."""


@dataclass(frozen=True)
class Hours:
    """GPU-hours of one iteration."""

    rollout: float
    update: float
    cost: float | None
    """In the currency of `cluster.prices`; none without a price for both GPU types."""


@dataclass(frozen=True)
class Plan:
    """All of it."""

    shape: ModelShape
    update: Memory
    rollout: Memory
    concurrent: int | None
    traffic: Traffic
    hours: Hours | None
    """None when a GPU type is unknown or none is asked for."""
    tasks: int
    pods: int
    runs: int

    @property
    def problems(self) -> list[str]:
        """What does not fit, with the setting to change."""
        found = {"update": self.update, "rollout": self.rollout}
        return [
            f"{name} needs {memory.total / GIB:.1f} GiB a GPU, {memory.available / GIB:.1f} are there: {memory.advice}"
            for name, memory in found.items()
            if memory.fits is False and memory.available is not None
        ]


def make_plan(settings: PipelineSettings, shape: ModelShape) -> Plan:
    """The plan of a settings file for a model of that shape."""
    update_gpu, rollout_gpu = gpu_of(settings.cluster.update), gpu_of(settings.cluster.rollout)
    update = update_memory(settings, shape, memory_of(settings.cluster.update))
    rollout = rollout_memory(settings, shape, memory_of(settings.cluster.rollout))
    concurrent = concurrent_samples(settings, shape, rollout)
    hours = None
    if update_gpu and rollout_gpu and concurrent:
        hours = _hours(settings, shape, update_gpu, rollout_gpu, concurrent)
    first, remaining = split(settings)
    runs = 1 + -(-remaining // first.iterations)
    tasks = task_count(first) + bool(remaining)
    nodes = settings.update.nodes * first.iterations if settings.update.nodes > 1 else 0
    return Plan(
        shape, update, rollout, concurrent, traffic(settings, shape), hours, tasks=tasks, pods=2 * tasks + nodes,
        runs=runs,
    )  # fmt: skip


def gpu_of(pod: StageResources) -> Gpu | None:
    """The stage's GPU, if its type is known."""
    return find_gpu(pod.gpu_type) if pod.gpus else None


def memory_of(pod: StageResources) -> float | None:
    """Bytes a process may use: of its GPU as the settings say or as its type has; of its pod without one."""
    if not pod.gpus:
        return quantity(pod.memory)
    if pod.gpu_memory:
        return quantity(pod.gpu_memory)
    found = find_gpu(pod.gpu_type)
    return found.memory_gib * GIB if found else None


def samples(settings: PipelineSettings) -> int:
    """Training completions of an iteration."""
    return settings.rollout.num_prompts * settings.rollout.group_size


def tokens(settings: PipelineSettings) -> tuple[float, float]:
    """Prompt and completion tokens of an iteration's training samples, as expected."""
    prompt = (settings.dataset.max_prompt_length or 512) * samples(settings) / 2
    return prompt, samples(settings) * settings.rollout.max_completion_length * COMPLETION_SHARE


def traffic(settings: PipelineSettings, shape: ModelShape) -> Traffic:
    """Of one iteration."""
    update = settings.update
    value = BYTES.get(update.publish_dtype, 2)
    whole = float(value * shape.parameters)
    adapter = float(value * shape.lora(update.lora.rank)) if update.lora.rank else 0.0
    policy = adapter if adapter and update.lora.publish == "adapter" else whole
    patch = policy / delta_factor(update.learning_rate, update.num_epochs * update.num_minibatches)
    trained = shape.lora(update.lora.rank) if update.lora.rank else shape.parameters
    state = trained * (8 if value == 4 else 12) if update.carry_optimizer else 0
    if update.carry_optimizer and update.algorithm == "ppo":  # the critic's weights are stored nowhere else
        state += 12 * shape.parameters
    optimizer = float(state) / update.optimizer_every
    completions = COMPLETION_BYTES * sum(tokens(settings))
    small = patch if update.delta.enabled and not adapter else policy
    down = (settings.shards + update.nodes) * max(whole, policy) + update.nodes * optimizer
    down += whole * update.nodes if loads_reference(update) else 0
    down += (2 + update.nodes) * completions
    return Traffic(
        policy, patch, optimizer, completions, up_full=policy + optimizer + completions,
        up_delta=small + optimizer + completions, down=down,
    )  # fmt: skip


def delta_factor(learning_rate: float, steps: int) -> float:
    """How many times smaller a patch is, of the next measured case that changes more; 1 beyond all of them."""
    for rate, factors in sorted(DELTA_FACTORS.items()):
        if learning_rate <= rate:
            for count, factor in sorted(factors.items()):
                if steps <= count:
                    return factor
    return 1.0


def _hours(settings: PipelineSettings, shape: ModelShape, update: Gpu, rollout: Gpu, concurrent: int) -> Hours:
    """Training: 6 P a token, 2 P for each pass without gradients. Decoding: weights and cache read once a step. What is
    asked for counts, also GPUs that no process uses."""
    prompt, completion = tokens(settings)
    knobs = settings.update
    steps = knobs.num_epochs * knobs.num_minibatches
    passes = 6 * knobs.num_epochs + (2 * knobs.num_epochs if knobs.gradient_checkpointing else 0)
    passes += (2 if steps > 1 else 0) + (2 if knobs.beta > 0 else 0)
    factor = 2 if knobs.algorithm == "ppo" else 1
    training = factor * passes * shape.active * (prompt + completion) / (update.tflops * 1e12 * MFU) / 3600
    training *= max(settings.cluster.update.gpus / update_processes(settings), 1)
    held_out = (settings.dataset.num_eval or 256) * settings.rollout.eval_group_size / settings.rollout.eval_every
    total = (samples(settings) + held_out) / samples(settings) * completion
    width = rollout_width(settings)
    batch = min(concurrent, settings.rollout.vllm.max_num_seqs or 256, max(samples(settings) // settings.shards, 1))
    cache = batch * longest(settings) / 2 * 2 * shape.kv_values
    read = (2 * shape.parameters + cache) / width
    seconds = max(read / (rollout.gb_per_second * 1e9 * BANDWIDTH_SHARE),
                  2 * shape.active * batch / width / (rollout.tflops * 1e12 * MFU))  # fmt: skip
    sampling = total / batch * seconds * max(settings.cluster.rollout.gpus, width) / 3600
    prices = settings.cluster.prices
    each = [prices.get(pod.gpu_type or "") for pod in (settings.cluster.rollout, settings.cluster.update)]
    cost = None if None in each else sampling * (each[0] or 0) + training * (each[1] or 0)
    return Hours(sampling, training, cost)

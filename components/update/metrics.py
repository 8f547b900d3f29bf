"""Figures of an update, gathered over micro-batches, optimizer steps and ranks, under the names TRL's users know."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from components.update.batching import Step
from components.update.tied import TiedEmbedding

if TYPE_CHECKING:
    from components.update.engine import Engine
    from components.update.model import ScoringModel
    from components.update.train import Trainer

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
"""Dense bfloat16 operations a second, from the vendor's data sheets (SXM where there are several)."""


class Meter:
    """Means, smallest and largest values over everything added; on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.largest: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor) -> None:
        """Adds values to a mean."""
        self.add(name, values.sum(), values.numel())

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Adds a sum over `count` things to a mean."""
        self.sums[name] = self.sums.get(name, 0.0) + torch.as_tensor(total, dtype=torch.float64, device=self.device)
        self.counts[name] = self.counts.get(name, 0.0) + count

    def max(self, name: str, values: Tensor) -> None:
        """Adds values to a maximum."""
        if values.numel():
            value = values.max().to(torch.float64)
            self.largest[name] = torch.maximum(self.largest[name], value) if name in self.largest else value

    def min(self, name: str, values: Tensor) -> None:
        """Adds values to a minimum."""
        self.max(f"-{name}", -values)

    def take(self, other: "Meter") -> None:
        """Adds all that another meter holds."""
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])
        for name, value in other.largest.items():
            self.max(name, value)

    def read(self) -> dict[str, float]:
        """The figures over all ranks; every rank calls, with whatever names it has."""
        names = self._all_names()
        totals = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)
        largest = torch.full((len(names),), -torch.inf, dtype=torch.float64, device=self.device)
        for row, name in enumerate(names):
            if name in self.sums:
                totals[row, 0], totals[row, 1] = self.sums[name], self.counts[name]
            if name in self.largest:
                largest[row] = self.largest[name]
        torch.distributed.all_reduce(totals)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        figures: dict[str, float] = {}
        for name, (total, count), maximum in zip(names, totals.tolist(), largest.tolist(), strict=True):
            if count:
                figures[name] = total / count
            elif maximum > -torch.inf:
                figures[name.removeprefix("-")] = -maximum if name.startswith("-") else maximum
        return figures

    def _all_names(self) -> list[str]:
        """Names any rank has: one with idle micro-batches only has none."""
        gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(gathered, [*self.sums, *self.largest])
        return sorted({name for names in gathered for name in names})


def training_flops(model: "ScoringModel", lengths: Sequence[int], num_scored: int) -> float | None:
    """Floating-point operations of one forward and backward pass over sequences.

    None for a mixture of experts, and for a model whose configuration holds its text model's in another.

    Of each matrix element and token that meets it 2 forward, 2 for the gradient of its input, 2 for its own, which a
    frozen one has not; the head meets the `num_scored` tokens, an embedding is looked up. Causal attention takes
    2 x length^2 x width a layer forward and twice that backward (arXiv:2204.02311, appendix B).
    """
    config = model.policy.config
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    if not all(hasattr(config, name) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")):
        return None
    head = model.policy.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | TiedEmbedding)}
    flops = _each_token(head) * num_scored
    for parameter in model.parameters():
        if parameter is not head and id(parameter) not in tables:
            flops += _each_token(parameter) * sum(lengths)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = config.num_hidden_layers * (2 if hasattr(model, "critic") else 1)
    return float(flops + 6 * layers * width * sum(length * length for length in lengths))


def _each_token(parameter: Tensor) -> int:
    """Operations that a matrix costs a token; a vector costs next to nothing."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return (6 if parameter.requires_grad else 4) * math.prod(shape) if len(shape) > 1 else 0


def peak_flops(name: str) -> float | None:
    """What a GPU of this name can do, when it is a known one."""
    words = re.split(r"[\s-]+", name)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in words), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()  # getrusage would begin at what the parent process held
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def speed_figures(
    trainer: "Trainer", engine: "Engine", steps: Sequence[Step], *, training: float, setup: float
) -> dict[str, float]:
    """Tokens, seconds, memory, padding and, on a known GPU, model FLOP utilisation; the largest memory of any rank.

    `training` and `setup` are the seconds of the optimizer steps, and of all before them.
    """
    lengths_S, device = trainer.batch.model_lengths, trainer.device
    parts = [part for step in steps for rank in step.ranks for part in rank]
    lengths = np.concatenate([lengths_S[part] for part in parts]) if parts else np.zeros(0)
    tokens = float(lengths.sum())
    cells = sum(_cells(lengths_S[part], trainer.padded) for part in parts)
    memory = torch.tensor(float(peak_memory_bytes(device)), device=device)
    torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
    figures = {
        "num_tokens": tokens, "num_steps": float(len(steps)), "step_time": training, "setup_time": setup,
        "tokens_per_second": tokens / training, "padding_share": 1.0 - tokens / max(cells, 1),
        "peak_memory_bytes": memory.item(),
    }  # fmt: skip
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    scored = sum(int(trainer.batch.scored_lengths[part].sum()) for part in parts)
    if peak is not None and (flops := training_flops(engine.model, lengths.tolist(), scored)):
        figures["mfu"] = flops / training / peak / trainer.world_size
    return figures


def _cells(lengths: np.ndarray, padded: bool) -> int:
    """Tokens a micro-batch computes; an idle one computes one."""
    return max(int(lengths.max(initial=0)) * len(lengths) if padded else int(lengths.sum()), 1)

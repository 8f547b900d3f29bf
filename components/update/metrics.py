"""Figures of an update, gathered over micro-batches, optimizer steps and ranks, under the names TRL's users know."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from components.update.batching import Step

if TYPE_CHECKING:
    from components.update.engine import Engine
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


def model_flops(num_parameters: int, num_layers: int, hidden_size: int, lengths: list[int], passes: float) -> float:
    """Floating-point operations of a transformer over sequences; a forward pass is 1, forward and backward 3.

    2 a parameter and token, and for causal attention 2 x length^2 x hidden a layer (arXiv:2204.02311, appendix B).
    """
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    return passes * (2.0 * num_parameters * tokens + 2.0 * num_layers * hidden_size * squares)


def peak_flops(device: torch.device) -> float | None:
    """What the device can do, when it is a known one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    peak, config = peak_flops(device), engine.model.policy.config
    if peak is not None:
        size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.model.parameters())
        flops = model_flops(size, config.num_hidden_layers, config.hidden_size, lengths.tolist(), passes=3.0)
        figures["mfu"] = flops / training / peak / trainer.world_size
    return figures


def _cells(lengths: np.ndarray, padded: bool) -> int:
    """Tokens a micro-batch computes; an idle one computes one."""
    return max(int(lengths.max(initial=0)) * len(lengths) if padded else int(lengths.sum()), 1)

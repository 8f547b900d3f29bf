"""GPUs by name: memory, speed. From the vendors' data sheets, dense rates, without sparsity."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU type."""

    name: str
    memory_gib: float
    """Memory a process can use."""
    tflops: float
    """bfloat16 (float16 where there is none) matrix products, 10^12 operations a second."""
    gb_per_second: float
    """Memory bandwidth, 10^9 bytes a second."""


GPUS = (
    Gpu("b200", 178, 2250, 8000),
    Gpu("h200", 139, 989, 4800),
    Gpu("h100", 79, 989, 3350),
    Gpu("a100-40", 39, 312, 1555),
    Gpu("a100", 79, 312, 2039),
    Gpu("l40s", 44, 362, 864),
    Gpu("l4", 22, 121, 300),
    Gpu("a10", 22, 125, 600),
    Gpu("t4", 14.5, 65, 320),
    Gpu("v100", 15.7, 125, 900),
)


def find_gpu(name: str | None) -> Gpu | None:
    """The GPU that a node label's value names, such as `nvidia-h100-80gb` or `NVIDIA-A100-SXM4-40GB`."""
    words = re.split(r"[^a-z0-9]+", (name or "").lower())
    for gpu in GPUS:
        base, _, size = gpu.name.partition("-")
        if any(word in (base, f"{base}g") for word in words) and (not size or f"{size}gb" in words):
            return gpu
    return None

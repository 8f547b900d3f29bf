"""Where the tensors lie in a safetensors file, read from its head alone.

Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format).
"""

import bisect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.errors import ArtifactError

WIDTHS = {
    "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of an element; any other type is looked at byte by byte."""
MAX_HEAD = 100 << 20
BLOCK_BYTES = 4 << 20
"""Bytes of a block; part of the patch format, since both ends cut the file by it."""


@dataclass(frozen=True)
class Tensor:
    """One tensor: bytes [start, stop) of the file."""

    name: str
    dtype: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Bytes of an element."""
        width = WIDTHS.get(self.dtype, 1)
        return width if (self.stop - self.start) % width == 0 else 1


@dataclass(frozen=True)
class Layout:
    """A file's head and its tensors in the order they lie."""

    head: bytes
    """Length and JSON, as they stand in the file."""
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.tensors[-1].stop if self.tensors else len(self.head)

    @classmethod
    def read(cls, path: Path) -> "Layout":
        """Reads a file's head. Raises ArtifactError when it is not safetensors."""
        with path.open("rb") as file:
            length = file.read(8)
            count = int.from_bytes(length, "little")
            if len(length) < 8 or not 2 <= count <= MAX_HEAD:
                raise ArtifactError(f"{path.name} is not a safetensors file: no head")
            layout = cls.parse(length + file.read(count), where=path.name)
        if layout.size != path.stat().st_size:
            raise ArtifactError(f"{path.name}: its head speaks of {layout.size} bytes, it has {path.stat().st_size}")
        return layout

    @classmethod
    def parse(cls, head: bytes, *, where: str) -> "Layout":
        """Reads a head. Raises ArtifactError when it is damaged or leaves holes between tensors."""
        try:
            entries: dict[str, Any] = json.loads(head[8:])
            entries.pop("__metadata__", None)
            tensors = []
            for name, entry in entries.items():
                start, stop = entry["data_offsets"]
                tensors.append(Tensor(name, str(entry["dtype"]), len(head) + int(start), len(head) + int(stop)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{where} is not a safetensors file: {error}") from None
        tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
        at = len(head)
        for tensor in tensors:
            if tensor.start != at or tensor.stop < at:
                raise ArtifactError(f"{where} is not a safetensors file: {tensor.name} does not start where one ends")
            at = tensor.stop
        return cls(head, tuple(tensors))

    def gather(self, other: "Layout", data: memoryview, start: int, stop: int) -> memoryview:
        """Bytes of the same tensors in another file, laid out as [start, stop) of this one; zeros where it has none."""
        there = {tensor.name: tensor for tensor in other.tensors}
        out = bytearray(stop - start)
        first = bisect.bisect_right([tensor.start for tensor in self.tensors], start) - 1
        for tensor in self.tensors[max(first, 0) :]:
            if tensor.start >= stop:
                break
            found = there.get(tensor.name)
            if found and found.dtype == tensor.dtype and found.stop - found.start == tensor.stop - tensor.start:
                low, high = max(start, tensor.start), min(stop, tensor.stop)
                shift = found.start - tensor.start
                out[low - start : max(high, low) - start] = data[low + shift : max(high, low) + shift]
        return memoryview(out)


def cut_blocks(layout: Layout) -> list[tuple[int, int, int]]:
    """The tensors' bytes in blocks: (start, stop, width), each of elements of one width."""
    runs: list[list[int]] = []
    for tensor in layout.tensors:
        if tensor.stop == tensor.start:
            continue
        if runs and runs[-1][2] == tensor.width and runs[-1][1] == tensor.start:
            runs[-1][1] = tensor.stop
        else:
            runs.append([tensor.start, tensor.stop, tensor.width])
    return [
        (at, min(at + BLOCK_BYTES, stop), width)
        for start, stop, width in runs
        for at in range(start, stop, BLOCK_BYTES)
    ]

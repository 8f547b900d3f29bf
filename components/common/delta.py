"""Lossless patches between two safetensors files: what a training step changed, and nothing else.

A step at reinforcement-learning rates leaves most low-precision weights bit-identical (arXiv:2602.03839) and moves the
rest by a unit in the last place or a few. A patch holds, a block of the file at a time, the gaps between changed
elements and the differences of their values in such units; both compress to nearly their entropy.

    GRPODELT | payload: zstd frames | index: zstd'd JSON | length of the index, 8 bytes | GRPODELT

Integers stand for bit patterns throughout, so NaN payloads and signed zeros survive. Blocks depend on the new file
alone: the patches of a chain share them, and a chain is applied in one pass over the base.

# E elements of a block, C changed ones
"""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common import delta_block
from components.common.errors import ArtifactError, DigestMismatch
from components.common.safetensors_layout import Layout, cut_blocks
from components.common.scheduling import bounded_map

MAGIC = b"GRPODELT"
VERSION = 1


@dataclass(frozen=True)
class Report:
    """What an encoding found."""

    elements: int
    """Values in the new file."""
    changed: int
    """Values that differ from the base's, bit for bit."""
    size: int
    """Bytes of the patch."""


@dataclass(frozen=True)
class Patch:
    """An open patch file."""

    path: Path
    base: str
    """Digest of the file it applies to."""
    result: str
    """Digest of the file it makes."""
    header: bytes | None
    """Head of the new file; none when it is the base's."""
    blocks: list[Any]
    """A block each: changed elements and lengths of its frames; null when nothing changed."""
    offsets: list[int]
    """Where each block's frames start in the file."""


def encode(
    base: Path, new: Path, patch: Path, *, base_digest: str, new_digest: str, limit: int | None = None, threads: int = 0
) -> Report | None:
    """Writes the patch that turns `base` into `new`.

    `limit`: bytes after which it is given up (None is returned, nothing is left behind).

    Raises:
        ArtifactError: one of the files is not safetensors.
    """
    import zstandard

    layout_base, layout = Layout.read(base), Layout.read(new)
    same = layout.head == layout_base.head
    blocks = cut_blocks(layout)
    entries: list[Any] = []
    try:
        with patch.open("wb") as out, _mapped(base) as base_bytes, _mapped(new) as new_bytes:
            out.write(MAGIC)

            def work(block: tuple[int, int, int]) -> tuple[int, list[bytes]]:
                start, stop, width = block
                old = base_bytes[start:stop] if same else layout.gather(layout_base, base_bytes, start, stop)
                return delta_block.encode(old, new_bytes[start:stop], width)

            for changed, frames in bounded_map(work, blocks, threads):
                entries.append([changed, [len(frame) for frame in frames]] if changed else None)
                out.writelines(frames)
                if limit is not None and out.tell() > limit:
                    patch.unlink()
                    return None
            header = None if same else layout.head.hex()
            index = {"version": VERSION, "base": base_digest, "result": new_digest, "header": header, "blocks": entries}
            packed = zstandard.ZstdCompressor(level=9).compress(json.dumps(index, separators=(",", ":")).encode())
            out.write(packed + len(packed).to_bytes(8, "little") + MAGIC)
    except BaseException:
        patch.unlink(missing_ok=True)
        raise
    changed = sum(entry[0] for entry in entries if entry)
    return Report(_count(blocks), changed, patch.stat().st_size)


def count_values(path: Path) -> int:
    """Values in a safetensors file. Raises ArtifactError."""
    return _count(cut_blocks(Layout.read(path)))


def _count(blocks: Sequence[tuple[int, int, int]]) -> int:
    return sum((stop - start) // width for start, stop, width in blocks)


def open_patch(path: Path) -> Patch:
    """Reads a patch's index.

    Raises:
        ArtifactError: not a patch, or one of another version.
    """
    import zstandard

    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
            end = file.seek(-16, os.SEEK_END)
            tail = file.read(16)
            length = int.from_bytes(tail[:8], "little")
            if head != MAGIC or tail[8:] != MAGIC or not 0 < length <= end - len(MAGIC):
                raise ValueError("no patch's beginning and end")
            file.seek(end - length)
            index = json.loads(zstandard.ZstdDecompressor().decompress(file.read(length)))
        if index["version"] != VERSION:
            raise ValueError(f"version {index['version']}, want {VERSION}")
        header = None if index["header"] is None else bytes.fromhex(index["header"])
        offsets, at = [], len(MAGIC)
        for entry in index["blocks"]:
            offsets.append(at)
            at += sum(entry[1]) if entry else 0
        return Patch(path, index["base"], index["result"], header, index["blocks"], offsets)
    except (OSError, ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
        raise ArtifactError(f"{path.name} is not a policy patch: {error}") from None


def decode(
    base: Path, patches: Sequence[Path], target: Path, *, base_digest: str, new_digest: str, threads: int = 0
) -> None:
    """Applies a chain of patches to `base` and writes the last result to `target`. What lies between two patches that
    change the file's layout is written beside the first patch.

    `base_digest` is what the caller knows the base to be, `new_digest` what the result must be.

    Raises:
        DigestMismatch: the base is not the one a patch was made for, or the result is not what it must be.
        ArtifactError: a patch cannot be read.
    """
    from components.common.manifest import file_digest

    chain = [open_patch(path) for path in patches]
    have = base_digest
    for patch in chain:
        if patch.base != have:
            raise DigestMismatch(f"{patch.path.name} applies to {patch.base}, not to {have}: fetch that base first")
        have = patch.result
    if have != new_digest:
        raise DigestMismatch(f"{chain[-1].path.name} makes {have}, want {new_digest}: the manifest names another patch")
    source = base
    parts = list(_passes(chain))
    try:
        for number, part in enumerate(parts):
            place = target if part is parts[-1] else patches[0].with_name(f"pass-{number}")
            try:
                _apply(source, part, place, threads)
            finally:
                if source != base:
                    source.unlink()
            source = place
        got = file_digest(target)
        if got != new_digest:
            raise DigestMismatch(
                f"the patches of {target.name} made {got}, want {new_digest}: the base or a patch was changed"
            )
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _passes(chain: Sequence[Patch]) -> Iterator[list[Patch]]:
    """Splits a chain where the layout of the file changes; each piece is one pass."""
    piece: list[Patch] = []
    for patch in chain:
        if piece and patch.header is not None:
            yield piece
            piece = []
        piece.append(patch)
    yield piece


def _apply(base: Path, chain: Sequence[Patch], target: Path, threads: int) -> None:
    """One pass: each block of the base goes through every patch, then to its place."""
    layout_base = Layout.read(base)
    header = chain[0].header
    layout = layout_base if header is None else Layout.parse(header, where=str(chain[0].path.name))
    blocks = cut_blocks(layout)
    if any(len(patch.blocks) != len(blocks) for patch in chain):
        raise ArtifactError(f"{chain[0].path.name}: its blocks do not fit the base; it was made for another file")
    with ExitStack() as stack:
        base_bytes = stack.enter_context(_mapped(base))
        payloads = [stack.enter_context(_mapped(patch.path)) for patch in chain]
        out = stack.enter_context(target.open("wb")).fileno()
        os.posix_fallocate(out, 0, layout.size)
        os.pwrite(out, layout.head, 0)

        def work(number: int) -> None:
            start, stop, width = blocks[number]
            old = base_bytes[start:stop] if header is None else layout.gather(layout_base, base_bytes, start, stop)
            todo = [(patch, payload) for patch, payload in zip(chain, payloads, strict=True) if patch.blocks[number]]
            if todo:
                values = delta_block.Block(old, width)
                for patch, payload in todo:
                    values.apply(*_frames(patch, payload, number))
                old = values.bytes()
            _write_at(out, old, start)

        for _ in bounded_map(work, range(len(blocks)), threads):
            pass


def _frames(patch: Patch, payload: memoryview, number: int) -> tuple[int, list[memoryview]]:
    changed, lengths = patch.blocks[number]
    at, frames = patch.offsets[number], []
    for length in lengths:
        frames.append(payload[at : at + length])
        at += length
    return changed, frames


def _write_at(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data, position)
        position, data = position + written, data[written:]


class _mapped:
    """A file's bytes as read-only memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> memoryview:
        with self.path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.map.madvise(mmap.MADV_SEQUENTIAL)
        self.view = memoryview(self.map)
        return self.view

    def __exit__(self, *_: object) -> None:
        # Arrays over the map may outlive this line by a moment; the map goes with the last of them.
        del self.view, self.map

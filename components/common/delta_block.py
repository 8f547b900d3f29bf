"""The codec of one block of a patch: positions as gaps, values as differences in units in the last place.

Frames of a block of width 2: gaps, signs, values, large values. Of another width: gaps, then a frame a byte of values.
Gaps take one byte when changes are dense enough, else two; the highest value says "so many unchanged, and more follow",
which keeps a geometric distribution geometric, so that zstd's entropy coder comes within 1 % of the optimum. An
optimizer moves a value by about the learning rate, which is one unit in the last place for all but the values nearest
to zero: from some magnitude on, the sign says all, and takes one bit.

# E elements of a block, C changed ones, W words of 8 bytes, N elements of words with a change
"""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from components.common.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

DENSE = 0.4
"""Changed share above which every element's difference is stored and no position."""
RARE = 0.4
"""Share of groups of 32 bytes with a change up to which the groups are looked through first."""
BYTE_GAPS = 1 / 300
"""Changed share above which gaps take one byte."""

_contexts = threading.local()


def encode(old: memoryview, new: memoryview, width: int) -> tuple[int, list[bytes]]:
    """Changed elements and the frames that tell them; no frames when nothing changed."""
    import numpy as np

    old_E, new_E = (np.frombuffer(data, f"<u{width}") for data in (old, new))
    positions_C, old_C, new_C = _changes(old_E, new_E)
    changed = positions_C.size
    if changed == 0:
        return 0, []
    if changed > DENSE * new_E.size:
        return changed, [b"", *_pack_planes(_steps(old_E, new_E))]
    steps_C = _steps(old_C, new_C)
    gaps = _pack_gaps(positions_C, changed > BYTE_GAPS * new_E.size)
    return changed, [gaps, *(_pack_steps(steps_C, old_C) if width == 2 else _pack_planes(steps_C))]


def _changes(old_E: "np.ndarray[Any, Any]", new_E: "np.ndarray[Any, Any]") -> "tuple[np.ndarray[Any, Any], ...]":
    """Positions of what changed, what it was and what it is.

    Where changes are rare they are looked for in three steps: in which 32 bytes, in which 8 of those, in which elements
    of those. Each step has a dense array of yes and no, which numpy goes through without branches.
    """
    import numpy as np

    def search() -> "tuple[np.ndarray[Any, Any], ...]":
        positions_C = np.flatnonzero(np.not_equal(old_E, new_E, out=_room(new_E.size, bool)))
        return positions_C, old_E[positions_C], new_E[positions_C]

    if new_E.nbytes % 32:  # the end of a run of tensors
        return search()
    old_W, new_W = old_E.view("<u8"), new_E.view("<u8")
    groups = np.not_equal(old_W, new_W, out=_room(new_W.size, bool)).view("<u4")
    hit = np.flatnonzero(groups != 0)
    if hit.size > RARE * groups.size:
        return search()
    of_four = np.flatnonzero(groups[hit].view(bool))
    words = (hit[of_four >> 2] << 2) + (of_four & 3)
    old_N, new_N = old_W[words].view(old_E.dtype), new_W[words].view(old_E.dtype)
    found_C, size = np.flatnonzero(old_N != new_N), 8 // old_E.itemsize
    return words[found_C // size] * size + found_C % size, old_N[found_C], new_N[found_C]


class Block:
    """A block of values that patches are applied to, one after the other; a thread has one at a time."""

    def __init__(self, data: memoryview, width: int) -> None:
        import numpy as np

        given_E = np.frombuffer(data, f"<u{width}")
        self.values_E = _room(given_E.size, given_E.dtype)
        self.values_E[:] = given_E

    def apply(self, changed: int, frames: Sequence[memoryview]) -> None:
        """Raises ArtifactError when the frames do not fit the block."""
        import zstandard

        try:
            gaps, *values = frames
            if not gaps:
                self.values_E = _move(self.values_E, _unpack_planes(values, self.values_E))
                return
            positions_C = _unpack_gaps(gaps)
            if positions_C.size != changed or positions_C[-1] >= self.values_E.size:
                raise ValueError("positions do not fit")
            old_C = self.values_E[positions_C]
            unpack = _unpack_steps if old_C.itemsize == 2 else _unpack_planes
            self.values_E[positions_C] = _move(old_C, unpack(values, old_C))
        except (ValueError, IndexError, zstandard.ZstdError) as error:
            raise ArtifactError(f"a patch is damaged: {error}") from None

    def bytes(self) -> memoryview:
        """The values as they stand now, until this thread's next block."""
        return memoryview(self.values_E).cast("B")


# --- values ---------------------------------------------------------------------------------------------------------


def _ordered(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Bit patterns of floats as integers in the floats' own order, modulo 2^bits; its own inverse."""
    bits = 8 * values.itemsize
    signed = values.view(f"<i{values.itemsize}")
    return signed ^ ((signed >> (bits - 1)) & signed.dtype.type((1 << (bits - 1)) - 1))


def _steps(old: "np.ndarray[Any, Any]", new: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Units in the last place from old to new, modulo 2^bits."""
    return _ordered(new) - _ordered(old)


def _move(old: "np.ndarray[Any, Any]", steps: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    moved = _ordered(old) + steps
    return _ordered(moved).view(old.dtype)


def _pack_steps(steps_C: "np.ndarray[Any, Any]", old_C: "np.ndarray[Any, Any]") -> list[bytes]:
    """Signs of the values from a magnitude on where every step is 1 or -1; the steps of the others."""
    import numpy as np

    small_C = (steps_C == 1) | (steps_C == -1)
    sizes_C = old_C & np.uint16(0x7FFF)
    start = 0 if small_C.all() else int(sizes_C[~small_C].max()) + 1
    plain_C = sizes_C >= start
    signs = start.to_bytes(2, "little") + np.packbits(steps_C[plain_C] < 0).tobytes()
    others = steps_C[~plain_C]
    large = (others > 127) | (others < -127)
    frames = [signs, _squeeze(np.where(large, -128, others).astype(np.int8)) if others.size else b""]
    return [*frames, _squeeze(others[large]) if large.any() else b""]


def _unpack_steps(frames: Sequence[memoryview], old_C: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    import numpy as np

    signs, values, large = frames
    plain_C = (old_C & np.uint16(0x7FFF)) >= int.from_bytes(signs[:2], "little")
    steps_C = np.empty(old_C.size, np.int16)
    bits = np.unpackbits(np.frombuffer(signs[2:], np.uint8), count=int(np.count_nonzero(plain_C)))
    steps_C[plain_C] = 1 - 2 * bits.astype(np.int16)
    if values:
        others = np.frombuffer(_expand(values), np.int8).astype(np.int16)
        if large:
            others[others == -128] = np.frombuffer(_expand(large), "<i2")
        steps_C[~plain_C] = others
    return steps_C


def _pack_planes(steps: "np.ndarray[Any, Any]") -> list[bytes]:
    """Zigzag steps, all first bytes, all second bytes, and so on."""
    import numpy as np

    width = steps.itemsize
    zigzag = ((steps << 1) ^ (steps >> (8 * width - 1))).view(f"<u{width}")
    planes = zigzag.view(np.uint8).reshape(-1, width)
    return [_squeeze(np.ascontiguousarray(planes[:, place])) for place in range(width)]


def _unpack_planes(frames: Sequence[memoryview], like: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    import numpy as np

    width = like.itemsize
    planes = np.empty((like.size, width), np.uint8)
    for place, frame in enumerate(frames):
        planes[:, place] = np.frombuffer(_expand(frame), np.uint8)
    zigzag = planes.reshape(-1).view(f"<u{width}")
    one = zigzag.dtype.type(1)
    return ((zigzag >> one) ^ -(zigzag & one).view(f"<i{width}").view(zigzag.dtype)).view(f"<i{width}")


# --- positions ------------------------------------------------------------------------------------------------------


def _pack_gaps(positions_C: "np.ndarray[Any, Any]", one_byte: bool) -> bytes:
    """First byte of the frame's content: width of a gap."""
    import numpy as np

    more = 255 if one_byte else 65535
    gaps_C = np.diff(positions_C, prepend=-1) - 1
    longest = int(gaps_C.max())
    if longest < more:
        codes = gaps_C.astype(np.uint8 if one_byte else "<u2")
    else:
        repeats_C = gaps_C // more
        codes = np.full(gaps_C.size + int(repeats_C.sum()), more, np.uint8 if one_byte else "<u2")
        codes[np.cumsum(repeats_C + 1) - 1] = gaps_C - repeats_C * more
    if one_byte:
        return _squeeze(np.concatenate([np.ones(1, np.uint8), codes]))
    planes = np.ascontiguousarray(codes.view(np.uint8).reshape(-1, 2).T).reshape(-1)
    return _squeeze(np.concatenate([np.full(1, 2, np.uint8), planes]))


def _unpack_gaps(frame: memoryview) -> "np.ndarray[Any, Any]":
    import numpy as np

    content = np.frombuffer(_expand(frame), np.uint8)
    if content[0] == 1:
        codes, more = content[1:], 255
    else:
        codes = np.ascontiguousarray(content[1:].reshape(2, -1).T).reshape(-1).view("<u2")
        more = 65535
    skips = codes == more
    steps = codes.astype(np.intp)
    steps += ~skips  # to the changed one itself; a skip ends before it
    steps[0] -= 1
    return np.cumsum(steps, out=steps)[~skips]


def _room(count: int, dtype: Any) -> "np.ndarray[Any, Any]":
    """Memory of this thread's for `count` values; memory that is new costs more to touch than to fill."""
    import numpy as np

    size = count * np.dtype(dtype).itemsize
    if getattr(_contexts, "room", None) is None or _contexts.room.size < size:
        _contexts.room = np.empty(max(size, 1 << 20), np.uint8)
    return _contexts.room[:size].view(dtype)


def _squeeze(array: "np.ndarray[Any, Any]") -> bytes:
    import zstandard

    if not hasattr(_contexts, "out"):  # a compressor is no thread's but its own
        _contexts.out = zstandard.ZstdCompressor(level=1)
    return bytes(_contexts.out.compress(memoryview(array).cast("B")))


def _expand(frame: memoryview) -> bytes:
    import zstandard

    if not hasattr(_contexts, "back"):
        _contexts.back = zstandard.ZstdDecompressor()
    return bytes(_contexts.back.decompress(frame))

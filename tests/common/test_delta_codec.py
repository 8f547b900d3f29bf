"""Patches between policies: bit-identical whatever the bits, refused when anything does not fit."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.common import delta, delta_block, safetensors_layout
from components.common.errors import ArtifactError, DigestMismatch
from components.common.manifest import file_digest

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
Tensors = dict[str, tuple[str, list[int], bytes]]


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file, put together by hand so that any type and any bits can stand in it."""
    entries, body = {}, b""
    if metadata:
        entries["__metadata__"] = metadata
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    head = json.dumps(entries).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + body)
    return path


@st.composite
def tensor(draw: st.DrawFn) -> tuple[str, list[int], bytes]:
    dtype = draw(st.sampled_from(sorted(WIDTHS)))
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    count = int(np.prod(shape)) * WIDTHS[dtype]
    return dtype, shape, draw(st.binary(min_size=count, max_size=count))


@st.composite
def chain_of_policies(draw: st.DrawFn) -> list[Tensors]:
    """A policy and versions of it: values changed, and sometimes a tensor added, dropped, moved or of another type."""
    policies = [draw(st.dictionaries(st.sampled_from("abcdef"), tensor(), max_size=5))]
    for _ in range(draw(st.integers(1, 3))):
        now = dict(policies[-1])
        for name, (dtype, shape, data) in list(now.items()):
            changed = bytearray(data)
            for place in draw(st.lists(st.integers(0, max(len(data) - 1, 0)), max_size=6)) if data else []:
                changed[place] = draw(st.integers(0, 255))
            now[name] = dtype, shape, bytes(changed)
        if draw(st.booleans()) and draw(st.booleans()):
            now[draw(st.sampled_from("abcdefg"))] = draw(tensor())
            now = dict(draw(st.permutations(sorted(now.items()))))
        policies.append(now)
    return policies


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(policies=chain_of_policies(), block=st.sampled_from([8, 64, 4 << 20]), threads=st.sampled_from([1, 2]))
def test_any_chain_of_policies_comes_back_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: list[Tensors], block: int, threads: int
) -> None:
    monkeypatch.setattr(safetensors_layout, "BLOCK_BYTES", block)
    files = [write(tmp_path / f"policy{number}", policy) for number, policy in enumerate(policies)]
    digests = [file_digest(file) for file in files]
    patches = []
    for number in range(1, len(files)):
        patches.append(tmp_path / f"patch{number}")
        report = delta.encode(
            files[number - 1], files[number], patches[-1], threads=threads,
            base_digest=digests[number - 1], new_digest=digests[number],
        )  # fmt: skip
        assert report and report.size == patches[-1].stat().st_size
    delta.decode(
        files[0], patches, tmp_path / "result", base_digest=digests[0], new_digest=digests[-1], threads=threads
    )
    assert (tmp_path / "result").read_bytes() == files[-1].read_bytes()
    assert not list(tmp_path.glob("pass-*"))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), width=st.sampled_from([1, 2, 4, 8]), share=st.sampled_from([0.0, 0.001, 0.05, 0.3, 0.7, 1.0]))
def test_any_block_comes_back_bit_by_bit(data: st.DataObject, width: int, share: float) -> None:
    count = data.draw(st.integers(1, 3000) | st.integers(1, 100).map(lambda groups: 32 * groups))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    old = random.integers(0, 256, count * width, dtype=np.uint8)
    new = old.copy().reshape(-1, width)
    where = random.random(count) < share
    new[where] = random.integers(0, 256, (int(where.sum()), width), dtype=np.uint8)
    new = new.reshape(-1)
    changed, frames = delta_block.encode(memoryview(old), memoryview(new), width)
    assert changed == int((old.reshape(-1, width) != new.reshape(-1, width)).any(axis=1).sum())
    block = delta_block.Block(memoryview(old), width)
    if changed:
        block.apply(changed, [memoryview(frame) for frame in frames])
    assert bytes(block.bytes()) == new.tobytes()


SPECIAL_BF16 = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x7FFF, 0x0001, 0x8001, 0x3F80, 0xBF80]
"""+0, -0, ±infinity, NaNs with different payloads, the smallest subnormals, ±1."""


def test_zeros_infinities_and_nan_payloads_turn_into_one_another(tmp_path: Path) -> None:
    pairs = np.array([(a, b) for a in SPECIAL_BF16 for b in SPECIAL_BF16], np.uint16)
    count = len(pairs)
    base = write(tmp_path / "base", {"w": ("BF16", [count], pairs[:, 0].tobytes())})
    new = write(tmp_path / "new", {"w": ("BF16", [count], pairs[:, 1].tobytes())})
    report = delta.encode(
        base, new, tmp_path / "patch", base_digest=file_digest(base), new_digest=file_digest(new), threads=1
    )
    assert report and report.changed == 12 * 11  # every pair but those of equal bits
    assert report.elements == 12 * 12
    digests = {"base_digest": file_digest(base), "new_digest": file_digest(new)}
    delta.decode(base, [tmp_path / "patch"], tmp_path / "result", **digests)
    assert (tmp_path / "result").read_bytes() == new.read_bytes()


def test_steps_are_units_in_the_last_place() -> None:
    one, after_one, minus_one = np.array([0x3F80, 0x3F81, 0xBF80], np.uint16)
    assert delta_block._steps(np.array([one]), np.array([after_one])) == 1
    assert delta_block._steps(np.array([after_one]), np.array([one])) == -1
    below_minus_one = np.array([0xBF81], np.uint16)  # larger in magnitude, so one step down
    assert delta_block._steps(np.array([minus_one]), below_minus_one) == -1
    plus_zero, minus_zero = np.array([0x0000], np.uint16), np.array([0x8000], np.uint16)
    assert delta_block._steps(plus_zero, minus_zero) == -1


def policy_pair(folder: Path, count: int = 200_000, share: float = 0.01) -> tuple[Path, Path]:
    """Weights like a model's, and the same a training step later: some values moved by one unit."""
    random = np.random.default_rng(0)
    weights = ((random.standard_normal(count, dtype=np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16)
    later = weights.copy()
    where = random.random(count) < share
    later[where] = delta_block._move(weights[where], random.choice(np.array([-1, 1], np.int16), int(where.sum())))
    return (
        write(folder / "base", {"w": ("BF16", [count], weights.tobytes())}),
        write(folder / "new", {"w": ("BF16", [count], later.tobytes())}),
    )


def test_one_percent_of_changes_takes_a_hundredth_of_the_bytes(tmp_path: Path) -> None:
    base, new = policy_pair(tmp_path)
    report = delta.encode(base, new, tmp_path / "patch", base_digest="b", new_digest="n")
    assert report
    # Entropy of the positions is 8.08 bits a changed value, of its sign 1: no coder takes less than 9.08.
    assert 9.0 < report.size * 8 / report.changed < 11.5


def encoded(folder: Path) -> tuple[Path, Path, Path, dict[str, str]]:
    base, new = policy_pair(folder)
    digests = {"base_digest": file_digest(base), "new_digest": file_digest(new)}
    delta.encode(base, new, folder / "patch", **digests)
    return base, new, folder / "patch", digests


def test_a_wrong_base_is_refused_before_any_work(tmp_path: Path) -> None:
    _, new, patch, digests = encoded(tmp_path)
    with pytest.raises(DigestMismatch, match="fetch that base first"):
        delta.decode(new, [patch], tmp_path / "result", **digests | {"base_digest": file_digest(new)})
    assert not (tmp_path / "result").exists()


def test_another_result_than_the_caller_wants_is_refused_before_any_work(tmp_path: Path) -> None:
    base, _, patch, digests = encoded(tmp_path)
    with pytest.raises(DigestMismatch, match=f"patch makes {digests['new_digest']}, want blake3:{'0' * 64}"):
        delta.decode(base, [patch], tmp_path / "result", **digests | {"new_digest": "blake3:" + "0" * 64})
    assert not (tmp_path / "result").exists()


def test_a_base_that_lies_about_itself_is_found_out(tmp_path: Path) -> None:
    base, _, patch, digests = encoded(tmp_path)
    changed = bytearray(base.read_bytes())
    changed[-1] ^= 1
    base.write_bytes(changed)
    with pytest.raises(DigestMismatch, match="the base or a patch was changed"):
        delta.decode(base, [patch], tmp_path / "result", **digests)
    assert not (tmp_path / "result").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_patch_never_gives_a_result(tmp_path: Path, place: float, value: int, cut: bool) -> None:
    base, new, patch, digests = encoded(tmp_path)
    data = bytearray(patch.read_bytes())
    at = int(place * len(data))
    data[at] ^= value
    patch.write_bytes(data[:at] if cut else data)
    try:
        delta.decode(base, [patch], tmp_path / "result", **digests)
    except ArtifactError:
        assert not (tmp_path / "result").exists()
    else:  # a byte of the index that says the same either way
        assert (tmp_path / "result").read_bytes() == new.read_bytes()


def test_a_patch_larger_than_its_limit_is_given_up(tmp_path: Path) -> None:
    base, new = policy_pair(tmp_path, share=0.9)
    assert delta.encode(base, new, tmp_path / "patch", base_digest="b", new_digest="n", limit=1000) is None
    assert not (tmp_path / "patch").exists()


def head(offsets: list[int]) -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no head"),
        (b"\x80\x04pickle by its first bytes", "no head"),
        ((10).to_bytes(8, "little") + b"not json!!", "is not a safetensors file"),
        (head([4, 12]) + bytes(12), "does not start"),
        (head([0, 8]) + bytes(7), "speaks of"),
    ],
)
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    base, _ = policy_pair(tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        delta.encode(base, bad, tmp_path / "patch", base_digest="b", new_digest="n")
    assert not (tmp_path / "patch").exists()


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the file, no more blocks are under way than two a thread."""
    monkeypatch.setattr(safetensors_layout, "BLOCK_BYTES", 1024)
    base, new = policy_pair(tmp_path)
    digests = {"base_digest": file_digest(base), "new_digest": file_digest(new)}
    real, ahead = delta.bounded_map, []

    def watched(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
        """Counts blocks that are begun and not yet taken, by a disk so slow that the threads run as far as they may."""
        begun: list[int] = []

        def counted(item: Any) -> Any:
            begun.append(1)
            return work(item)

        for taken, result in enumerate(real(counted, items, threads), 1):
            time.sleep(0.001)
            ahead.append(len(begun) - taken)
            yield result

    monkeypatch.setattr(delta, "bounded_map", watched)
    delta.encode(base, new, tmp_path / "patch", **digests, threads=3)
    delta.decode(base, [tmp_path / "patch"], tmp_path / "result", **digests, threads=3)
    assert len(ahead) == 2 * math.ceil(2 * 200_000 / 1024)
    assert 1 <= max(ahead) <= 2 * 3
    assert len(os.listdir(tmp_path)) == 4

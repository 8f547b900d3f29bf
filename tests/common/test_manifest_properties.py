"""Any manifest comes back from its JSON as it was, and none that was altered is taken."""

import json
import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.common.errors import ArtifactError
from components.common.integrity import blob_key
from components.common.manifest import File, Manifest, Patch, PatchStep, Producer, content_digest

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
digests = HEX.map("blake3:{}".format)
parts = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,8}", fullmatch=True)
names = st.lists(parts, min_size=1, max_size=3).map("/".join)
sizes = st.integers(0, 2**50)
texts = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def files(draw: st.DrawFn) -> File:
    digest, size = draw(digests), draw(sizes)
    results = draw(st.lists(digests, max_size=3))
    if not results:
        return File(name=draw(names), size=size, digest=digest, key=blob_key(digest))
    base = draw(digests)
    steps = []
    for result in [*results[:-1], digest]:
        patch = draw(digests)
        share = draw(st.floats(0, 1))
        steps.append(PatchStep(key=blob_key(patch), size=draw(sizes), digest=patch, result=result, changed=share))
    chain = Patch(base=base, base_size=draw(sizes), steps=tuple(steps))
    return File(name=draw(names), size=size, digest=digest, key=blob_key(base), patch=chain)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    entries = tuple(draw(st.lists(files(), max_size=4, unique_by=lambda file: file.name)))
    kind = draw(st.sampled_from(["policy", "optimizer", "prompts", "rollout", "scored", "evaluation", "decision"]))
    producer = Producer(stage=draw(texts), key=draw(texts), settings_digest=draw(texts), code_version=draw(texts))
    return Manifest(
        kind=kind, digest=content_digest(kind, entries), files=entries, producer=producer, fine_tune=draw(texts),
        run=draw(texts), iteration=draw(st.none() | st.integers(0, 10**6)), store=draw(texts),
        parents=draw(st.dictionaries(texts, digests, max_size=3)),
        metrics=draw(st.dictionaries(texts, numbers, max_size=3)),
        metadata=draw(st.dictionaries(texts, json_values, max_size=3)),
        created=draw(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1))).replace(tzinfo=UTC),
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(manifest=manifests())
def test_a_manifest_comes_back_as_it_was(manifest: Manifest) -> None:
    again = Manifest.parse(manifest.dump(), where="test")
    assert again == manifest
    assert again.dump() == manifest.dump()


@settings(max_examples=60, deadline=None)
@given(manifest=manifests(), data=st.data())
def test_an_altered_content_is_not_taken(manifest: Manifest, data: st.DataObject) -> None:
    values = json.loads(manifest.dump())
    change = data.draw(
        st.sampled_from(["kind", "digest", "add"] + (["size", "name", "drop"] if values["files"] else []))
    )
    if change == "kind":
        values["kind"] = "policy" if values["kind"] != "policy" else "scored"
    elif change == "digest":
        values["digest"] = "blake3:" + "0" * 64
    elif change == "add":
        values["files"].append(
            {"name": "new", "size": 1, "digest": "blake3:" + "1" * 64, "key": "blobs/blake3/" + "1" * 64}
        )
    elif change == "drop":
        values["files"].pop()
    elif change == "size":
        values["files"][0]["size"] += 1
    else:
        values["files"][0]["name"] += "x"
    with pytest.raises(ArtifactError):
        Manifest.parse(json.dumps(values).encode(), where="test")


@settings(max_examples=30, deadline=None)
@given(manifest=manifests(), data=st.data())
def test_the_same_content_has_the_same_digest(manifest: Manifest, data: st.DataObject) -> None:
    """Whoever made it, whenever, in whatever order, whole or as patches."""
    shuffled = data.draw(st.permutations(list(manifest.files)))
    whole = [File(name=f.name, size=f.size, digest=f.digest, key=blob_key(f.digest)) for f in shuffled]
    assert content_digest(manifest.kind, whole) == manifest.digest


@given(data=st.binary(max_size=200))
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="is not a manifest of schema 1"):
        Manifest.parse(data, where="test")


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(ArtifactError, match="schema_version"):
        Manifest.parse(b'{"schema_version": 2}', where="test")


def test_a_figure_that_is_not_finite_can_be_told() -> None:
    """A run that diverges publishes NaN; its manifest must stay readable."""
    producer = Producer(stage="s", key="k", settings_digest="", code_version="")
    manifest = Manifest(
        kind="policy", digest=content_digest("policy", ()), producer=producer, fine_tune="t", run="r", store="",
        created=datetime(2026, 1, 1, tzinfo=UTC), metrics={"loss": math.nan, "kl": math.inf, "low": -math.inf},
    )  # fmt: skip
    again = Manifest.parse(manifest.dump(), where="test")
    assert math.isnan(again.metrics["loss"])
    assert (again.metrics["kl"], again.metrics["low"]) == (math.inf, -math.inf)

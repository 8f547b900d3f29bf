"""Which files weights are read from, what is read from them, and whose policy that proves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.errors import DataError, DigestMismatch
from components.common.manifest import Manifest, file_digest
from components.rollout.weights import proven_digest, read_hashed, weight_files

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "float8_e4m3fn",
    "uint16",
    "uint32",
    "uint64",
    "float8_e8m0fnu",
]


def test_tensors_of_every_type_are_read_as_safetensors_reads_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(3, 5, generator=generator) * 10).to(getattr(torch, name)) for name in DTYPES
    } | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "long": torch.arange(1000)}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    digest, got = read_hashed(tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert (
            torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else got[name] == tensor
        )
    assert digest == file_digest(tmp_path / "x.safetensors")


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "x.safetensors")
    _, tensors = read_hashed(tmp_path / "x.safetensors")
    tensors["a"] += 1
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 0, 0, 0]


def test_only_files_of_the_index_are_read(tmp_path):
    for name in ("model-00001-of-00002", "model-00002-of-00002", "consolidated"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    assert weight_files(tmp_path) == parts
    (tmp_path / parts[1]).unlink()
    with pytest.raises(DataError, match=r"names model-00002-of-00002\.safetensors, which the policy does not have"):
        weight_files(tmp_path)


def test_the_proof_is_of_what_was_loaded_and_of_every_small_file(make_job, policy_dir):
    manifest = Manifest.load(make_job().policy)
    loaded = {"model.safetensors": file_digest(policy_dir / "model.safetensors")}
    assert proven_digest(manifest, policy_dir, loaded) == manifest.digest
    with pytest.raises(
        DigestMismatch, match=r"the engine loaded no weights, the policy's weights are model\.safetensors"
    ):
        proven_digest(manifest, policy_dir, {})
    with pytest.raises(DigestMismatch, match=r"another model\.safetensors"):
        proven_digest(manifest, policy_dir, {"model.safetensors": "blake3:" + "0" * 64})


def test_a_changed_tokenizer_is_no_proof_either(make_job, policy_dir, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in policy_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    with pytest.raises(DigestMismatch, match=r"another tokenizer\.json"):
        proven_digest(Manifest.load(make_job().policy), copy, {})


@pytest.mark.parametrize("name", ["zz.safetensors", "model.safetensors.index.json", "adapter/adapter_config.json"])
def test_a_file_an_engine_would_read_and_the_policy_does_not_name_is_no_proof(make_job, policy_dir, tmp_path, name):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in policy_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    loaded = {"model.safetensors": file_digest(policy_dir / "model.safetensors")}
    manifest = Manifest.load(make_job().policy)
    assert proven_digest(manifest, copy, loaded) == manifest.digest
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"{}")
    with pytest.raises(DigestMismatch, match=f"{name} is no file of the policy"):
        proven_digest(manifest, copy, loaded)


def test_a_number_format_nobody_knows_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"00")
    with pytest.raises(DataError, match="a has number format F4, which no engine here reads"):
        read_hashed(tmp_path / "x.safetensors")

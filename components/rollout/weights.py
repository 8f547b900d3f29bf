"""The files of a policy folder an engine takes its weights from, and the proof that it took the right ones."""

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import DataError, DigestMismatch
from components.common.manifest import Manifest, content_digest, file_digest

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""safetensors' names of number formats → torch's."""

ADAPTER_FOLDER = "adapter"
"""Folder of a LoRA policy that holds its adapter (`adapter_config.json`, `adapter_model.safetensors`)."""


def adapter_folder(policy: Path) -> Path | None:
    """Folder of the adapter; None for a policy without one."""
    folder = policy / ADAPTER_FOLDER
    return folder if (folder / "adapter_config.json").exists() else None


def weight_files(policy: Path) -> list[str]:
    """Names of the base model's weight files in `policy`.

    Raises:
        DataError: there are none.
    """
    names = sorted(path.name for path in policy.glob("*.safetensors"))
    index = policy / "model.safetensors.index.json"
    if index.exists():  # some models have their weights twice, the second time in their makers' own format
        parts = set(json.loads(index.read_text())["weight_map"].values())
        if missing := parts - set(names):
            raise DataError(
                f"{index} names {', '.join(sorted(missing))}, which the policy does not have: save it again"
            )
        return sorted(parts)
    if not names:
        raise DataError(
            f"no weights: {policy} has no *.safetensors file; a policy is a folder in Hugging Face format, "
            "saved with save_pretrained(..., safe_serialization=True)"
        )
    return names


def context_length(policy: Path) -> int | None:
    """Most tokens the model can attend to; None where its configuration does not say."""
    config = read_config(policy)
    return config.get("max_position_embeddings", config.get("n_positions"))


def vocabulary_size(policy: Path) -> int | None:
    """Rows of the model's embedding table."""
    return read_config(policy).get("vocab_size")


def stored_dtype(policy: Path) -> str:
    """Number format the weights are stored in, as the configuration has it; float32 where it does not say."""
    config = read_config(policy)
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def kv_bytes_per_token(policy: Path) -> int:
    """Bytes of KV cache a token takes: keys and values of every layer, at 4 bytes a number."""
    config = read_config(policy)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * 4 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width


def read_config(policy: Path) -> dict:
    """The model's `config.json`, or its text part for a model of several modalities.

    Raises:
        DataError: missing or not JSON.
    """
    path = policy / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"no config.json in {policy}: not a model folder in Hugging Face format") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    return config.get("text_config") or config


def read_hashed(path: Path) -> "tuple[str, dict[str, torch.Tensor]]":
    """Digest of a safetensors file and its tensors, both from one mapping of it: no second opening can be of another.

    The tensors lie in the mapped file, read-only by convention; no byte is copied. A file that is written to while it
    is loaded goes unnoticed; the node cache never does that, it replaces files by renaming.

    Raises:
        DataError: not a safetensors file, or cut.
    """
    import torch
    from blake3 import blake3

    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise DataError(f"{path} is empty, want a safetensors file") from None
    digest = "blake3:" + blake3(max_threads=blake3.AUTO).update(data).hexdigest()
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise DataError(f"{path}: {name} has number format {entry['dtype']}, which no engine here reads")
            dtype = getattr(torch, _DTYPES[entry["dtype"]])
            flat = (
                torch.frombuffer(data, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start + first)
                if last > first
                else torch.empty(0, dtype=dtype)
            )
            tensors[name] = flat.view(entry["shape"])
    except (ValueError, KeyError, UnicodeDecodeError, RuntimeError, OverflowError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}; fetch or save the policy again") from None
    return digest, tensors


def proven_digest(manifest: Manifest, policy: Path, loaded: Mapping[str, str]) -> str:
    """Digest of the policy an engine holds, from the bytes it loaded; never copied from the request.

    `loaded` are the digests of the weight files as the engine read them; the small files (configuration, tokenizer)
    are read here. Every weight file must have been loaded, and nothing else may lie in the folder: engines read what
    they find there.

    Raises:
        DigestMismatch: a file is not the policy's; a sample of it would be another model's.
    """
    there = {path.relative_to(policy).as_posix() for path in policy.rglob("*") if path.is_file()}
    if foreign := sorted(there - manifest.names):
        raise DigestMismatch(
            f"{policy / foreign[0]} is no file of the policy: clear that cache and run the stage again"
        )
    entries = []
    for file in manifest.files:
        digest = loaded.get(file.name) or file_digest(policy / file.name)
        if digest != file.digest:
            raise DigestMismatch(
                f"the engine loaded another {file.name} than the policy's: want {file.digest}, got {digest}; "
                f"something changed {policy / file.name} after it was fetched: clear that cache and run the stage again"
            )
        entries.append(file.model_copy(update={"digest": digest, "size": (policy / file.name).stat().st_size}))
    weights = {
        *weight_files(policy),
        *(name for name in there if name.startswith(f"{ADAPTER_FOLDER}/") and ".safetensors" in name),
    }
    if set(loaded) != weights:
        raise DigestMismatch(
            f"the engine loaded {', '.join(sorted(loaded)) or 'no weights'}, the policy's weights are "
            f"{', '.join(sorted(weights))}: nothing proves which policy it holds"
        )
    return content_digest(manifest.kind, entries)

"""Writing the next policy: the same files as the last one had, with new weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save(engine: Any, folder: Path, *, dtype: str) -> None:
    """Writes the weights as safetensors of `dtype`, an adapter merged; every rank takes part, rank 0 writes."""
    weights = gather(engine, getattr(torch, dtype))
    if torch.distributed.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    engine.model.policy.save_pretrained(folder, state_dict=weights, max_shard_size="4GB")
    for path in folder.iterdir():
        if ".safetensors" not in path.name:
            path.unlink()


def gather(engine: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights on the host, whole and each once, on rank 0; empty elsewhere."""
    import deepspeed

    from components.update.lora import merged_weights

    model, first, found = engine.model.policy, torch.distributed.get_rank() == 0, {}
    if hasattr(model, "peft_config"):
        return merged_weights(model, dtype) if first else {}
    divided = engine.settings.zero_stage == 3
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=divided):
            if first:
                found[name] = parameter.detach().to("cpu", dtype, copy=divided)
    return found


def stored_dtype(folder: Path) -> str:
    """Type of the first floating-point weight of a policy folder, as its safetensors header names it."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in names:
                return names[entry["dtype"]]
    return "float32"

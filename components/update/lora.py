"""Low-rank adapters (arXiv:2106.09685) through peft: what trains, what is stored, what is merged.

The adapter lives in the policy's folder `adapter/`, beside base weights that never change and are stored once; with the
adapter switched off, the policy is its own reference.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.common.errors import DataError
from components.update.config import LoraSettings

FOLDER = "adapter"
WEIGHTS, CONFIGURATION = "adapter_model.safetensors", "adapter_config.json"
NAME = "default"
"""The adapter's name inside peft."""


def attach(policy: nn.Module, settings: LoraSettings, folder: Path | None) -> Any:
    """Puts an adapter on the policy's linear modules, in place, and freezes all else; gives peft's handle.

    `folder`: of the adapter to go on with; None: a fresh one, which changes nothing until it is trained.

    Raises:
        DataError: the stored adapter has another shape than the settings want.
    """
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if settings.targets == ["all-linear"] else settings.targets
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    peft_model = get_peft_model(policy, config, autocast_adapter_dtype=False)
    if folder is not None:
        _load(peft_model, folder, settings)
    return peft_model


def switch_on(model: nn.Module, folder: Path) -> None:
    """Puts a stored adapter on a model that is only read, in place."""
    from peft import PeftModel

    PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)


def _load(peft_model: Any, folder: Path, settings: LoraSettings) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    stored = json.loads((folder / CONFIGURATION).read_text())
    for name, wanted in (("r", settings.rank), ("lora_alpha", settings.alpha)):
        if stored[name] != wanted:
            raise DataError(
                f"the policy's adapter has {name} = {stored[name]}, settings want {wanted}; keep lora.rank and "
                "lora.alpha through a fine-tune, or start another one"
            )
    outcome = set_peft_model_state_dict(peft_model, load_file(folder / WEIGHTS))
    if outcome.unexpected_keys:
        raise DataError(
            f"the policy's adapter has weights for {outcome.unexpected_keys[0]}, which lora.targets does not name"
        )


def save(peft_model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes the adapter in peft's format, without any trace of where it was made."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(peft_model)
    save_file(
        {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS
    )
    values = peft_model.peft_config[NAME].to_dict() | {"base_model_name_or_path": None, "inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    (folder / CONFIGURATION).write_text(json.dumps(plain, indent=1, sort_keys=True, default=str))


def merged_weights(policy: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The policy's weights with the adapter added, under the base model's names; added in float32, then rounded."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}
    found = {}
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, last = name.rpartition(".base_layer.")
        value = parameter.detach().float()
        if owner in layers and last == "weight":
            value = value + layers[owner].get_delta_weight(NAME).detach().float()
        found[f"{owner}.{last}" if owner else name] = value.to("cpu", dtype)
    return found

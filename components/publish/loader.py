"""Loads an accepted policy from MLflow's registry: `mlflow.pyfunc.load_model("models:/<name>@champion")`.

The registered model is the policy's manifest, a few KB. Loading it fetches the weights from the object store, each file
checked against its digest, so the store must be reachable and this package installed; nothing of the model is executed.
"""

import tempfile
from pathlib import Path
from typing import Any

from components.common.artifacts import fetch
from components.common.manifest import Manifest
from components.common.store import open_store


class Policy:
    """An accepted policy: `folder` holds it as a plain Hugging Face model, `predict` samples greedily from it."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._directory = tempfile.TemporaryDirectory(prefix="grpo-policy-")
        self.folder = fetch(open_store(manifest.store), manifest, Path(self._directory.name))
        self._model: Any = None

    def get_raw_model(self) -> "Policy":
        """What `mlflow.pyfunc`'s `get_raw_model()` gives: this object, for its `folder` and `manifest`."""
        return self

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Completions of prompts: a list of texts, or a table with the column `prompt`.

        `params` go to `generate`; without any, up to 256 tokens are taken greedily. MLflow passes none through its own
        `predict`, since a manifest has no signature: use `get_raw_model().predict(prompts, {...})`.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._model is None:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            self._model = tokenizer, AutoModelForCausalLM.from_pretrained(self.folder)
        tokenizer, model = self._model
        prompts = [
            str(prompt) for prompt in (model_input["prompt"] if hasattr(model_input, "columns") else model_input)
        ]
        tokens = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        chosen = {"max_new_tokens": 256, "do_sample": False} | (params or {})
        out = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pad_token_id=tokenizer.pad_token_id,
            **chosen,
        )
        return tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def _load_pyfunc(path: str) -> Policy:
    """What MLflow calls with the path of the manifest."""
    return Policy(Manifest.load(Path(path)))

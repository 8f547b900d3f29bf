"""A model's size from its config.json: parameters, and bytes a token of KV cache; no weights are read.

L layers   H hidden size   V vocabulary   F inner size of the MLP   D size of a head   E experts
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.errors import DataError

QK_NORM = ("qwen3", "qwen3_moe")
"""Architectures with a norm on each head's queries and keys."""
QKV_BIAS = ("qwen2", "qwen2_moe")
"""Architectures with biases on queries, keys and values, whatever `attention_bias` says."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with grouped attention and a gated MLP, dense or with experts (Llama, Mistral, Qwen)."""

    kind: str
    layers: int
    hidden: int
    vocabulary: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool
    bias: bool
    experts: int = 0
    experts_used: int = 0

    @staticmethod
    def of(config: dict[str, Any], *, where: str) -> "ModelShape":
        """From a config.json. Raises DataError when it is not of a decoder that these formulas describe."""
        try:
            heads, hidden, kind = config["num_attention_heads"], config["hidden_size"], config["model_type"]
            experts = config.get("num_experts") or config.get("num_local_experts") or 0
            inner = config.get("moe_intermediate_size") if experts else None
            return ModelShape(
                kind=kind, layers=config["num_hidden_layers"], hidden=hidden, vocabulary=config["vocab_size"],
                inner=inner or config["intermediate_size"], heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_size=config.get("head_dim") or hidden // heads, tied=bool(config.get("tie_word_embeddings")),
                bias=bool(config.get("attention_bias")), experts=experts,
                experts_used=config.get("num_experts_per_tok") or 0,
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: config.json of no causal decoder that can be planned for: {error}") from None

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        found = self.hidden * (queries + 2 * keys) + queries * self.hidden
        if self.bias or self.kind in QKV_BIAS:
            found += queries + 2 * keys + (self.hidden if self.bias and self.kind not in QKV_BIAS else 0)
        return found + (2 * self.head_size if self.kind in QK_NORM else 0)

    def mlp(self, experts: int) -> int:
        """Parameters of one layer's MLP with so many experts counted, their router included."""
        one = 3 * self.hidden * self.inner
        return experts * one + self.experts * self.hidden if self.experts else one

    def _count(self, experts: int) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (self.attention + self.mlp(experts) + 2 * self.hidden) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self._count(self.experts)

    @property
    def active(self) -> int:
        """Parameters that take part in one token's computation."""
        return self._count(self.experts_used)

    def lora(self, rank: int) -> int:
        """Parameters of adapters on every linear module but the head: rank x (inputs + outputs) each."""
        h, q, k, f = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size, self.inner
        mlp = 3 * (h + f) * max(self.experts, 1)
        return self.layers * rank * ((h + q) + 2 * (h + k) + (q + h) + mlp)

    @property
    def kv_values(self) -> int:
        """Values a token adds to the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_size

    @property
    def layer_values(self) -> int:
        """Values a token leaves for one layer's backward pass: what autograd keeps of norms, projections, attention
        and a gated MLP (6 H + 5 heads D + 4 kv_heads D + 4 F), without the scores, which fused attention never stores.
        """
        inner = self.inner * max(self.experts_used, 1)
        return 6 * self.hidden + (5 * self.heads + 4 * self.kv_heads) * self.head_size + 4 * inner


def read_shape(model: str) -> ModelShape:
    """Of a local folder or a hub id.

    Raises:
        DataError: there is no config.json, or it cannot be reached.
    """
    if Path(model).is_dir():
        path = Path(model) / "config.json"
    elif "://" in model:
        raise DataError(f"model {model} is read on the cluster; give its config.json here with --config FILE")
    else:
        path = _from_hub(model)
    return read_config(path)


def read_config(path: Path) -> ModelShape:
    """Of a config.json."""
    try:
        return ModelShape.of(json.loads(path.read_text()), where=str(path))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: no readable config.json ({error})") from None


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"config.json of {model} is not to be had ({reason}); give it with --config FILE") from None

"""Runs inside each vLLM worker: loads safetensors and hashes the very bytes it loads.

Named to vLLM as `worker_extension_cls`, so it is imported in every worker process before the model is loaded.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from components.rollout.weights import read_hashed, weight_files

_digests: dict[str, str] = {}


@register_model_loader("verified")
class VerifiedLoader(DefaultModelLoader):
    """vLLM's own loading, fed from mapped files whose digests are kept."""

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        folder = Path(source.model_or_path)
        self.counter_before_loading_weights = time.perf_counter()
        for name in weight_files(folder):
            _digests[name], tensors = read_hashed(folder / name)
            for key, tensor in tensors.items():
                yield source.prefix + key, tensor

    def download_model(self, model_config: Any) -> None:
        """The policy is here already."""


class HashedWeights:
    """What a worker can be asked beyond vLLM's own methods."""

    def weight_digests(self) -> dict[str, str]:
        """Digest of each weight file this worker loaded."""
        return dict(_digests)

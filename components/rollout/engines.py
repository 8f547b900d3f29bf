"""Which engine samples, and starting it."""

import gc
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from components.common.errors import GrpoError, SettingsError, StageError
from components.common.manifest import Manifest
from components.rollout.config import RolloutSettings
from components.rollout.sampler import Sampler
from components.rollout.text import Decode

log = logging.getLogger("grpo")


def engine_name(settings: RolloutSettings) -> str:
    """The engine that `settings` mean on this machine.

    Raises:
        SettingsError: vLLM is asked for and is not installed.
    """
    installed = find_spec("vllm") is not None
    if settings.engine == "vllm" and not installed:
        raise SettingsError(
            'rollout.engine = "vllm", but this Python has no vllm: install it, name an interpreter that has it in '
            'rollout.python, or set rollout.engine = "transformers"'
        )
    if settings.engine == "auto":
        return "vllm" if installed else "transformers"
    return settings.engine


def start_engine(
    name: str, settings: RolloutSettings, policy: Path, manifest: Manifest, decode: Decode, *, longest: int,
    num_requests: int,
) -> Sampler:  # fmt: skip
    """Starts an engine with a policy, for so many requests of at most `longest` tokens, completion included.

    Raises:
        StageError: the engine did not start; the message names the settings that help.
    """
    gc.disable()  # importing an engine makes a million objects that stay: looking for garbage takes a sixth of its time
    try:
        if name == "vllm":
            from components.rollout.vllm_sampler import VllmSampler

            return VllmSampler(policy, settings, longest=longest, num_requests=num_requests)
        if name == "openai":
            from components.rollout.openai_sampler import OpenaiSampler

            return OpenaiSampler(settings, manifest)
        from components.rollout.transformers_sampler import TransformersSampler

        return TransformersSampler(policy, settings, lambda ids: decode([ids])[0])
    except GrpoError:
        raise
    except Exception as error:  # whatever an engine fails with, the user gets its words and the settings that help
        raise StageError(_explain(name, error)) from error
    finally:
        gc.freeze()
        gc.enable()


def _explain(name: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    hints: Sequence[tuple[tuple[str, ...], str]] = (
        (("out of memory", "No available memory", "KV cache", "free memory", "cannot allocate"), _MEMORY_HINT),
        (("max_model_len", "max seq len", "max_position_embeddings"), "lower rollout.max_completion_length"),
        (("quantiz",), "check rollout.vllm.quantization against the weights"),
        (("not supported", "architecture"), 'another engine may know this model: rollout.engine = "transformers"'),
    )
    hint = next((hint for words, hint in hints if any(word.lower() in text.lower() for word in words)), None)
    return f"the {name} engine did not start: {text}" + (f"; {hint}" if hint else "")


_MEMORY_HINT = (
    "it ran out of memory: lower rollout.vllm.gpu_memory_utilization (or raise it when other processes leave the GPU "
    "free), rollout.max_completion_length or rollout.vllm.max_num_seqs, or raise rollout.vllm.tensor_parallel_size; "
    "without a GPU set rollout.vllm.cpu_kv_cache_gib; for transformers lower rollout.batch_size"
)

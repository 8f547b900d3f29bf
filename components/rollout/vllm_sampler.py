"""Sampling with vLLM in this process: every request is in flight at once, each with its own seed.

# B samples in flight, T tokens
"""

import contextlib
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import DigestMismatch
from components.common.manifest import Manifest, file_digest
from components.rollout.config import RolloutSettings, VllmSettings
from components.rollout.sampler import Completion, Load, SampleRequest, Sampling, checked
from components.rollout.weights import adapter_folder, kv_bytes_per_token, proven_digest, stored_dtype, weight_files

if TYPE_CHECKING:
    from vllm import SamplingParams

log = logging.getLogger("grpo")

VERIFIED = "verified"
_GIB = 1 << 30
_CPU_STEP = 4096
"""Tokens of one engine step on CPU."""
_BLOCK = 128
"""Tokens of a KV cache block on CPU; smaller elsewhere."""


class VllmSampler:
    """Holds a policy folder in vLLM's offline engine. `longest`: most tokens of a prompt and its completion."""

    def __init__(self, policy: Path, settings: RolloutSettings, *, longest: int, num_requests: int) -> None:
        self.load, self.proof = Load(), "bytes"
        policy = policy.absolute()
        self.policy, self.settings = policy, settings
        self.adapter = adapter_folder(policy)
        unhashed = [] if settings.vllm.load_format == VERIFIED else weight_files(policy)
        if self.adapter:
            unhashed += [f"{self.adapter.name}/{path.name}" for path in self.adapter.glob("*.safetensors")]
        before = {name: file_digest(policy / name) for name in unhashed}
        _prepare_environment(settings)
        from vllm import LLM

        gc.freeze()  # vLLM looks for garbage five times while it starts; what its import leaves behind is none
        with contextlib.chdir(policy.parent):  # the model's path is part of the compile cache's key: keep it the same
            self.llm = LLM(**engine_arguments(policy, settings, longest=longest, num_requests=num_requests))
        if self.adapter:  # else it would be loaded by the first request, after what was hashed
            self.llm.llm_engine.add_lora(self._lora_request())
        self._digests = self._worker_digests() | {name: file_digest(policy / name) for name in unhashed}
        for name, digest in before.items():
            if self._digests[name] != digest:
                raise DigestMismatch(f"{policy / name} changed while vLLM loaded it: run the stage again")

    def held_digest(self, manifest: Manifest, policy: Path) -> str:
        """Digest of the policy, of the bytes that were loaded."""
        return proven_digest(manifest, policy, self._digests)

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[list[Completion]]:
        """Hands every request to the engine, then yields what each engine step finishes."""
        engine = self.llm.llm_engine
        names = self.llm.enqueue(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [sampling_params(request.sampling, request.seed) for request in requests],
            lora_request=self._lora_request(),
            use_tqdm=False,
        )
        # An output bears the number the engine counts a request by, without the random ending of its name.
        by_name = {name.partition("-")[0]: request for name, request in zip(names, requests, strict=True)}
        seats = engine.vllm_config.scheduler_config.max_num_seqs
        while unfinished := engine.get_num_unfinished_requests():
            self.load = Load(running=min(seats, unfinished), waiting=max(0, unfinished - seats))
            done = [output for output in engine.step() if output.finished]
            yield [_completion(by_name[output.request_id], output.outputs[0]) for output in done]
        self.load = Load()

    def tokens_in_flight(self) -> int:
        """Tokens drawn for requests that go on."""
        states = self.llm.llm_engine.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states)

    def close(self) -> None:
        """Ends the engine and its workers, and frees the device."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def _worker_digests(self) -> dict[str, str]:
        if self.settings.vllm.load_format != VERIFIED:
            return {}
        first, *others = self.llm.collective_rpc("weight_digests")
        if any(other != first for other in others):
            raise DigestMismatch("the workers of one engine loaded different weights: clear the node's model cache")
        return first

    def _lora_request(self) -> Any:
        if self.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", 1, str(self.adapter))


def engine_arguments(policy: Path, settings: RolloutSettings, *, longest: int, num_requests: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, started in the policy's parent folder; what the settings leave open is left to vLLM."""
    import torch

    ours, on_gpu = settings.vllm, torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": policy.name,
        "skip_tokenizer_init": not settings.stop,  # tokens in, tokens out; only stop texts need a tokenizer
        "dtype": stored_dtype(policy) if settings.dtype == "auto" else settings.dtype,  # vLLM's "auto" rounds float32
        "load_format": ours.load_format,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the policy's own top-k or penalties are not what was asked for
        "max_model_len": ours.max_model_len or longest,
        "enforce_eager": (not on_gpu) if ours.enforce_eager is None else ours.enforce_eager,
        "enable_prefix_caching": ours.enable_prefix_caching,
        "tensor_parallel_size": ours.tensor_parallel_size or max(1, torch.cuda.device_count()),
        "worker_extension_cls": "components.rollout.vllm_worker.HashedWeights",
        "disable_log_stats": True,
        "seed": 0,
    }
    optional = {
        "gpu_memory_utilization": ours.gpu_memory_utilization if on_gpu else None,
        "kv_cache_memory_bytes": None if on_gpu else _cpu_cache_bytes(policy, ours, longest, num_requests),
        "max_num_seqs": ours.max_num_seqs,
        "max_num_batched_tokens": ours.max_num_batched_tokens or (None if on_gpu else max(longest, _CPU_STEP)),
        # On CPU vLLM 0.32 fails when a seeded request's prompt is cut in two: `CPU Generator does not use offset`.
        "enable_chunked_prefill": None if on_gpu else False,
        "quantization": ours.quantization,
    }
    if adapter_folder(policy):
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": ours.max_lora_rank}
    return arguments | {name: value for name, value in optional.items() if value is not None}


def _cpu_cache_bytes(policy: Path, settings: VllmSettings, longest: int, num_requests: int) -> int:
    """KV cache of a machine without GPU: what all samples of this job need at once, or the setting."""
    if settings.cpu_kv_cache_gib is not None:
        return int(settings.cpu_kv_cache_gib * _GIB)
    tokens = -(-longest // _BLOCK) * _BLOCK * (min(num_requests, settings.max_num_seqs or num_requests) + 2)
    return min(max(tokens * kv_bytes_per_token(policy), _GIB // 16), 4 * _GIB)


def sampling_params(sampling: Sampling, seed: int) -> "SamplingParams":
    """One request's parameters: one sample, its own seed, the drawn token's log-probability."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or 0, seed=seed,
        max_tokens=sampling.max_tokens, logprobs=0, stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids), detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True,
    )  # fmt: skip


def _completion(request: SampleRequest, output: Any) -> Completion:
    ids = list(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        return Completion.failed(request, f"vLLM ended the request with {output.finish_reason!r}")
    flat = output.logprobs
    logprobs = [flat.logprobs[start] for start in flat.start_indices]  # of each position the drawn token comes first
    assert len(logprobs) == len(ids), f"{len(ids)} tokens, {len(logprobs)} log-probabilities"
    return checked(Completion(request, ids, logprobs, output.finish_reason))


def _prepare_environment(settings: RolloutSettings) -> None:
    """vLLM reads these variables when it is imported. Settings count; where there is none, one that is set stays."""
    import torch

    os.environ["VLLM_BATCH_INVARIANT"] = str(int(settings.vllm.batch_invariant))
    if settings.vllm.cache_dir is not None:
        os.environ["VLLM_CACHE_ROOT"] = settings.vllm.cache_dir
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: it starts sooner and ends with us
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if not torch.cuda.is_available():
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)  # later vLLM forbids it
        variables |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # shards share the cores; binding puts them all on the same ones
            # One small function stays under torch.compile even in eager mode; compiling it takes longer than a rollout.
            "TORCHDYNAMO_DISABLE": None if settings.vllm.enforce_eager is False else "1",
        }
    for name, value in variables.items():
        if value is not None:
            os.environ.setdefault(name, value)

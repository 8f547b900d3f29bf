"""Settings of the rollout stage."""

from typing import Literal

from pydantic import Field, field_validator

from components.common.settings import Settings

Engine = Literal["auto", "vllm", "transformers", "openai"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class VllmSettings(Settings):
    """How vLLM is started. What is not set is vLLM's own default for the device."""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights and KV cache."""
    cpu_kv_cache_gib: float | None = Field(default=None, gt=0)
    """KV cache on a machine without GPU, in GiB; unset: what the job's samples need, 4 GiB at most."""
    tensor_parallel_size: int | None = Field(default=None, ge=1)
    """GPUs one copy of the model is spread over; unset: all of the pod's. Shards are the data parallelism."""
    enforce_eager: bool | None = None
    """Neither compile nor capture CUDA graphs; unset: so on CPU, where compiling takes longer than it saves."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Samples decoded at once; the others wait."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one engine step, prompts and decoded ones together."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens of prompt and completion together; unset: the longest this job needs."""
    enable_prefix_caching: bool = True
    """Samples of one prompt share its KV cache."""
    quantization: str | None = None
    """Quantise the weights as they are loaded (`fp8`, `fp8_per_block`, …); unset: as they are stored."""
    load_format: str = "verified"
    """`verified` hashes the very bytes the engine loads; any of vLLM's own (`safetensors`, `runai_streamer`,
    `fastsafetensors`, …) is checked by hashing the files before and after loading."""
    max_lora_rank: int = Field(default=64, ge=1)
    """Largest rank of an adapter."""
    batch_invariant: bool = False
    """Bitwise the same samples in every batch, at some speed; needs a GPU of compute capability 9.0 or above."""
    cache_dir: str | None = None
    """Folder that outlives the pod for compiled graphs, so that a later start of the same shape skips compilation;
    unset: `vllm/` of `/cache` in our image, which outlives it with `cluster.rollout.cache_claim`."""


class OpenaiSettings(Settings):
    """A server that speaks the OpenAI completions protocol with token ids (vLLM, SGLang)."""

    base_url: str | None = None
    """Address up to and including `/v1`."""
    model: str | None = None
    """Name of the model to ask for; unset: the one whose name holds the policy's digest, else the only one served."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a server without keys needs none."""
    concurrency: int = Field(default=64, ge=1)
    """Requests in flight at once."""
    retries: int = Field(default=5, ge=0)
    """Further attempts after a refused connection, a time-out or an answer of 408, 409, 429 or 5xx; waits double."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for one answer."""
    allow_unproven: bool = False
    """Accept a server whose model name does not hold the policy's digest: it may serve other weights than asked for."""


class RolloutSettings(Settings):
    """Sampling completions from a policy."""

    engine: Engine = "auto"
    """`auto` takes vLLM where it is installed and transformers elsewhere; `openai` asks a running server."""
    python: str | None = None
    """Interpreter of another environment (one with vLLM) that runs this stage; unset: the present one."""
    num_prompts: int = Field(default=64, ge=1)
    """Training prompts an iteration, over all shards."""
    group_size: int = Field(default=8)
    """Completions a training prompt."""
    max_completion_length: int = Field(default=512, ge=1)
    """Hard stop for one completion, in tokens; a longer one is marked truncated."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it before a training completion's tokens are drawn."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of tokens whose probability reaches this; 1: from all."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw from this many of the likeliest tokens; unset: from all."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the policy's end tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the policy's end tokens."""
    eval_every: int = Field(default=1, ge=1)
    """Evaluate every so many policies on the held-out prompts; a run's first and last are always evaluated, with
    staleness 1 the last but one too."""
    eval_group_size: int = Field(default=4, ge=1)
    """Completions a held-out prompt."""
    eval_temperature: float = Field(default=1.0, ge=0)
    """Temperature of held-out completions; 0 takes the likeliest token."""
    eval_top_p: float = Field(default=1.0, gt=0, le=1)
    """`top_p` of held-out completions."""
    curriculum_weight: float = Field(default=1.0, gt=0, le=1)
    """How often a prompt is drawn whose last group was all alike (all right or all wrong), against one whose was not:
    0.25 draws it every fourth time. 1: every prompt once an epoch; 1 / weight is rounded to whole epochs."""
    dtype: Dtype = "auto"
    """Number format of the weights while sampling; `auto`: as they are stored."""
    batch_size: int = Field(default=1024, ge=1)
    """Samples decoded at once by the transformers engine."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the engine; unset: as many as the process may use."""
    max_failed_share: float = Field(default=0.05, ge=0, le=1)
    """Share of samples that may fail (refused by a server, NaN logits) before the iteration is stopped."""
    save_every_seconds: float = Field(default=60.0, ge=0)
    """Finished groups are saved this often, for a killed rollout to continue from; 0: as each one is finished."""
    progress_every_seconds: float = Field(default=5.0, gt=0)
    """How often a line of progress is logged."""
    vllm: VllmSettings = VllmSettings()
    """How vLLM is started."""
    openai: OpenaiSettings = OpenaiSettings()
    """The server that `engine = "openai"` asks."""

    @field_validator("group_size")
    @classmethod
    def _has_baseline(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be at least 2: one sample has no baseline")
        return value

    @field_validator("curriculum_weight")
    @classmethod
    def _postpones(cls, value: float) -> float:
        if value != 1 and round(1 / value) == 1:
            raise ValueError("must be 1 (no curriculum) or at most 0.66: 1 / weight is rounded to whole epochs")
        return value

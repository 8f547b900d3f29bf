"""What every engine gives: token ids in, token ids and their log-probabilities out.

Written by nobody, read by the stage: the Protocol keeps vLLM, transformers and a remote server interchangeable.

# B samples in flight, T tokens, V vocabulary
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from components.common.manifest import Manifest

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Sampling:
    """The distribution tokens are drawn from, and where a completion ends.

    Log-probabilities are those of the *processed* distribution: logits / temperature, cut to the `top_k` most likely
    tokens, then to the smallest set whose probability reaches `top_p`, renormalised. At temperature 0 the most
    likely token is taken and its log-probability is that of temperature 1.
    """

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion; they belong to it. Filled with the policy's end tokens by the stage."""


@dataclass(frozen=True)
class SampleRequest:
    """One completion to be drawn. Requests of one prompt stand next to each other: engines share its prefill."""

    prompt_id: str
    sample_index: int
    prompt_ids: Sequence[int]
    seed: int
    sampling: Sampling


@dataclass(frozen=True)
class Completion:
    """One completion: T token ids with T log-probabilities; the end token is among them when there is one."""

    request: SampleRequest
    completion_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    error: str | None = None

    @classmethod
    def failed(cls, request: SampleRequest, error: str) -> "Completion":
        """Records a sample that could not be drawn, with the reason."""
        return cls(request, [], [], "error", error)


@dataclass
class Load:
    """What an engine is busy with, for progress lines."""

    running: int = 0
    waiting: int = 0


class Sampler(Protocol):
    """An engine that holds one policy.

    `sample` yields each request's completion once, in any order, as many at a time as come together; while it takes
    long it yields none from time to time, so that progress can be told. A given engine
    draws the same completion for a request (same prompt, seed and sampling) in whichever batch or shard it stands, up
    to rounding in the logits.
    """

    load: Load

    proof: str
    """How it is known which policy the engine holds: by the `bytes` it loaded, a served model's `name`, or `none`."""

    def held_digest(self, manifest: Manifest, policy: Path) -> str:
        """Digest of the policy this engine holds, `policy` being the folder it was started with.

        Raises:
            DigestMismatch: it holds another one than `manifest` says.
        """

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[Sequence[Completion]]:
        """Draws a completion for every request."""

    def tokens_in_flight(self) -> int:
        """Tokens drawn so far for samples that were not yielded yet; 0 where an engine cannot tell."""

    def close(self) -> None:
        """Frees the device and ends child processes."""


def sample_seed(seed: int, split: str, iteration: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one sample in 0 … 2⁶³ - 1: a function of what the sample is, not of where or when it is drawn."""
    text = f"{seed}/{split}/{iteration}/{sample_index}/{prompt_id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def checked(completion: Completion) -> Completion:
    """Turns a completion with a log-probability that is no number (NaN logits) into a failed one."""
    if all(map(math.isfinite, completion.logprobs)):
        return completion
    return Completion.failed(completion.request, "the policy's logits are NaN or infinite")


def stop_tokens(policy: Path) -> tuple[int, ...]:
    """End tokens of a policy: those of `generation_config.json`, or of `config.json`, and its tokenizer's."""
    import json

    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = policy / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if value is not None:
            found += value if isinstance(value, list) else [value]
            break
    return tuple(dict.fromkeys([*found, *_tokenizer_end(policy)]))


def _tokenizer_end(policy: Path) -> list[int]:
    """The end token that `tokenizer_config.json` names; none where it or `tokenizer.json` does not."""
    import json

    config, vocabulary = policy / "tokenizer_config.json", policy / "tokenizer.json"
    token = json.loads(config.read_text()).get("eos_token") if config.exists() else None
    if token is None or not vocabulary.exists():
        return []
    from tokenizers import Tokenizer

    number = Tokenizer.from_file(str(vocabulary)).token_to_id(token["content"] if isinstance(token, dict) else token)
    return [] if number is None else [number]

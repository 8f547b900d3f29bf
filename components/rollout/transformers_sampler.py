"""Sampling with transformers: the engine that is always there, on CPU and GPU.

A decode loop of our own rather than `generate`: each prompt is run through the model once for all of its samples,
finished rows leave the batch, log-probabilities come with the draw, and a sample's randomness depends on its seed
and position alone, so neither batch nor shard nor a restart changes it.

# P prompts, B samples (rows), T prompt tokens, V vocabulary
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import DataError
from components.common.manifest import Manifest
from components.rollout.config import RolloutSettings
from components.rollout.draw import Draw, uniform
from components.rollout.sampler import Completion, Load, SampleRequest, Sampling, checked
from components.rollout.weights import adapter_folder, proven_digest, read_hashed, weight_files

if TYPE_CHECKING:
    import torch

log = logging.getLogger("grpo")


@dataclass
class _Rows:
    """Samples of one batch: what each has drawn so far."""

    requests: list[SampleRequest]
    ids: list[list[int]] = field(init=False)
    logprobs: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = [[] for _ in self.requests]
        self.logprobs = [[] for _ in self.requests]


class TransformersSampler:
    """Holds a policy folder as a transformers model; `batch_size` samples are drawn at a time."""

    def __init__(self, policy: Path, settings: RolloutSettings, decode: Callable[[list[int]], str]) -> None:
        import torch
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        self.load, self.proof = Load(), "bytes"
        self._rows = _Rows([])
        self.batch_size = settings.batch_size
        self.decode = decode
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(policy, local_files_only=True)
        dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else (config.dtype or torch.float32)
        self._digests, weights = {}, {}
        for name in weight_files(policy):
            self._digests[name], tensors = read_hashed(policy / name)
            weights |= tensors
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = architecture.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
        if adapter := adapter_folder(policy):
            model = self._adapt(model, adapter)
        self.model = model.to(self.device).eval()

    def _adapt(self, model: Any, adapter: Path) -> Any:
        """Puts a LoRA adapter on the model, unmerged, from the bytes that are hashed."""
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        model = get_peft_model(model, LoraConfig.from_pretrained(adapter, inference_mode=True))
        name = "adapter_model.safetensors"
        self._digests[f"{adapter.name}/{name}"], weights = read_hashed(adapter / name)
        outcome = set_peft_model_state_dict(model, weights)
        if outcome.unexpected_keys:
            raise DataError(f"the adapter does not fit the model: {outcome.unexpected_keys[0]} has no place in it")
        return model

    def held_digest(self, manifest: Manifest, policy: Path) -> str:
        """Digest of the policy, of the bytes that were loaded."""
        return proven_digest(manifest, policy, self._digests)

    def tokens_in_flight(self) -> int:
        """Tokens of the batch that is being drawn."""
        return sum(map(len, self._rows.ids))

    def close(self) -> None:
        """Frees the model."""
        del self.model

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[list[Completion]]:
        """Draws every request, about `batch_size` at a time, and yields a batch when all of it is drawn.

        Batches hold whole groups, so that one that goes on after finished batches forms the same ones as before.
        Before that, each token drawn yields nothing.
        """
        import torch

        self.load = Load(waiting=len(requests))
        for batch in _batches(requests, self.batch_size):
            self.load = Load(running=len(batch), waiting=self.load.waiting - len(batch))
            completions = []
            for ended in torch.inference_mode()(self._decode_batch)(batch, batch[0].sampling):
                completions += ended
                yield []
            self.load, self._rows = Load(waiting=self.load.waiting), _Rows([])
            yield completions

    def _decode_batch(self, requests: list[SampleRequest], sampling: Sampling) -> Iterator[list[Completion]]:
        """Draws a token of every row at a time; yields those that have ended."""
        import torch

        rows = self._rows = _Rows(requests)
        draw = Draw(sampling)
        prompts, owner = _distinct_prompts(requests)
        logits_BV, cache, mask_BT = self._prefill(prompts, owner)
        seeds_B = torch.tensor([request.seed for request in requests], device=self.device)
        alive = list(range(len(requests)))  # rows of the batch that are still growing
        lengths_B = mask_BT.sum(-1)
        for position in range(sampling.max_tokens):
            ids_B, logprobs_B = draw(logits_BV, uniform(seeds_B, position))
            reasons = self._note(rows, alive, ids_B.tolist(), logprobs_B.tolist(), sampling, position)
            yield [
                checked(Completion(requests[row], rows.ids[row], rows.logprobs[row], reason))
                for row, reason in zip(alive, reasons, strict=True) if reason
            ]  # fmt: skip
            kept = [slot for slot, reason in enumerate(reasons) if not reason]
            if not kept:
                return
            if len(kept) < len(alive):
                slots = torch.tensor(kept, device=self.device)
                ids_B, seeds_B, lengths_B, mask_BT = (x[slots] for x in (ids_B, seeds_B, lengths_B, mask_BT))
                cache.batch_select_indices(slots)
                alive = [alive[slot] for slot in kept]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], dim=1)
            output = self.model(
                input_ids=ids_B[:, None], attention_mask=mask_BT, position_ids=lengths_B[:, None],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            logits_BV = output.logits[:, -1]
            lengths_B = lengths_B + 1

    def _prefill(self, prompts: list[Sequence[int]], owner: list[int]) -> "tuple[torch.Tensor, Any, torch.Tensor]":
        """Runs each prompt once, then repeats its cache for its samples; prompts are padded on the left."""
        import torch
        from transformers import DynamicCache

        width = max(map(len, prompts))
        ids_PT = torch.zeros(len(prompts), width, dtype=torch.long)
        mask_PT = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_PT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_PT[row, width - len(prompt) :] = 1
        positions_PT = (mask_PT.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=ids_PT.to(self.device), attention_mask=mask_PT.to(self.device),
            position_ids=positions_PT.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        owner_B = torch.tensor(owner, device=self.device)
        cache.batch_select_indices(owner_B)
        return output.logits[:, -1][owner_B], cache, mask_PT.to(self.device)[owner_B]

    def _note(
        self, rows: _Rows, alive: list[int], ids: list[int], logprobs: list[float], sampling: Sampling, position: int
    ) -> list[str | None]:
        """Adds a token to each growing row; gives why a row ends here, or None."""
        reasons: list[str | None] = []
        last = position + 1 == sampling.max_tokens
        for row, token, logprob in zip(alive, ids, logprobs, strict=True):
            rows.ids[row].append(token)
            rows.logprobs[row].append(logprob)
            ended = token in sampling.stop_token_ids or logprob != logprob  # NaN: nothing sensible follows
            ended = ended or (bool(sampling.stop) and self._stops(rows.ids[row], sampling.stop))
            reasons.append("stop" if ended else "length" if last else None)
        return reasons

    def _stops(self, ids: list[int], stop: tuple[str, ...]) -> bool:
        longest = max(len(text.encode()) for text in stop)
        tail = self.decode(ids[-longest - 4 :])  # a token is at least a byte; the first may be parts of a character
        return any(text in tail for text in stop)


def _batches(requests: Sequence[SampleRequest], size: int) -> Iterator[list[SampleRequest]]:
    """Cuts requests into batches of one sampling and at most `size`, between groups; a larger group is cut itself."""
    batch: list[SampleRequest] = []
    for _, members in groupby(requests, key=lambda request: (request.sampling, request.prompt_id)):
        group = list(members)
        if batch and (batch[0].sampling != group[0].sampling or len(batch) + len(group) > size):
            yield batch
            batch = []
        batch += group
        while len(batch) > size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def _distinct_prompts(requests: Sequence[SampleRequest]) -> tuple[list[Sequence[int]], list[int]]:
    """The batch's prompts without repeats, and which of them each request has; requests of a prompt are neighbours."""
    prompts: list[Sequence[int]] = []
    owner: list[int] = []
    for request in requests:
        if not prompts or list(request.prompt_ids) != list(prompts[-1]):
            prompts.append(request.prompt_ids)
        owner.append(len(prompts) - 1)
    return prompts, owner

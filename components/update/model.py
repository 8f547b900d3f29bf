"""The policy as the update sees it: tokens in, log-probabilities and entropies of the completion tokens out.

    B sequences      T tokens read      N completion tokens scored      H hidden size      V vocabulary

The backbone runs over all tokens; the language-model head only over the positions that predict a completion token, in
chunks, so a [tokens, vocabulary] matrix never exists.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.common.errors import DataError
from components.update import attention
from components.update.attention import Packing
from components.update.batching import Batch
from components.update.head import TokenLoss, fused_head_loss, linear_logprobs
from components.update.tied import TiedEmbedding, TiedGradient

M_MMAP_THRESHOLD = -3
"""`mallopt`'s number of that parameter, from glibc's malloc.h."""


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences as one model call reads them; `tokens` is (1, T) packed or (B, L) padded."""

    sequences: np.ndarray
    """int64 (B,): numbers in the iteration's batch."""
    tokens: Tensor
    positions: Tensor
    packing: Packing | None
    select_N: Tensor
    """int64: flat position whose output predicts each completion token."""
    targets_N: Tensor
    """int64: the completion tokens."""
    sequence_N: Tensor
    """int64: local sequence of each completion token."""
    flat_N: np.ndarray
    """int64: number of each completion token in the batch's flat columns."""


def collate(batch: Batch, sequences: np.ndarray, *, padded: bool, device: torch.device) -> MicroBatch:
    """Lays sequences out for the model. Without any, one token of the batch is read so that the ranks keep in step."""
    if not len(sequences):
        return _idle(batch, padded=padded, device=device)
    prompts_B, completions_B = batch.prompt_lengths[sequences], batch.scored_lengths[sequences]
    lengths_B = batch.model_lengths[sequences]
    width = int(lengths_B.max())
    starts_B = np.arange(len(sequences)) * width if padded else np.cumsum(lengths_B) - lengths_B
    num_cells = width * len(sequences) if padded else int(lengths_B.sum())
    cells_T = _ranges(starts_B, lengths_B)
    tokens = np.zeros(num_cells, dtype=np.int64)
    tokens[cells_T] = np.concatenate([_inputs(batch, sequence) for sequence in sequences])
    positions = np.zeros(num_cells, dtype=np.int64)
    positions[cells_T] = _ranges(np.zeros_like(lengths_B), lengths_B)
    flat_N = _ranges(batch.completion_offsets[sequences], completions_B)
    shape = (len(sequences), width) if padded else (1, num_cells)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

    return MicroBatch(
        sequences=sequences, tokens=tensor(tokens).view(shape), positions=tensor(positions).view(shape),
        packing=None if padded else Packing.of(lengths_B, device),
        select_N=tensor(_ranges(starts_B + prompts_B - 1, completions_B)),
        targets_N=tensor(batch.completion_ids[flat_N]),
        sequence_N=tensor(np.repeat(np.arange(len(sequences)), completions_B)), flat_N=flat_N,
    )  # fmt: skip


def _idle(batch: Batch, *, padded: bool, device: torch.device) -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    token = torch.full((1, 1), int(batch.prompt_ids[0]), dtype=torch.int64, device=device)
    packing = None if padded else Packing.of(np.array([1]), device)
    empty = np.zeros(0, dtype=np.int64)
    return MicroBatch(empty, token, torch.zeros_like(token), packing, nothing, nothing, nothing, empty)


def _inputs(batch: Batch, sequence: int) -> np.ndarray:
    """Prompt and completion without its last token."""
    prompt = batch.prompt_ids[batch.prompt_offsets[sequence] : batch.prompt_offsets[sequence + 1]]
    start, end = batch.completion_offsets[sequence : sequence + 2]
    return np.concatenate([prompt, batch.completion_ids[start : end - 1]]) if end > start else prompt[:-1]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each range, one range after another."""
    shifts = starts - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(shifts, lengths)


class ScoringHead(nn.Module):
    """The language-model head: same weight, but it scores given tokens instead of giving logits."""

    def __init__(self, linear: nn.Linear, tied: TiedGradient | None) -> None:
        super().__init__()
        self.tied = tied
        if linear.bias is not None:
            raise DataError("a language-model head with a bias is not supported; choose a model without one")
        self.weight = linear.weight

    def forward(
        self, hidden_NH: Tensor, targets_N: Tensor, temperature: float, token_loss: TokenLoss | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of `token_loss` (0 without one), log-probabilities (N,), entropies (N,)."""
        if token_loss is None:
            scores = linear_logprobs(hidden_NH, self.weight, targets_N, temperature=temperature, tied=self.tied)
            return hidden_NH.new_zeros(()), *scores
        result = fused_head_loss(hidden_NH, self.weight, targets_N, token_loss, temperature=temperature, tied=self.tied)
        return result.loss, result.logprobs_N, result.entropy_N


class ScoringModel(nn.Module):
    """A causal language model with its head replaced; parameters keep their names."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        head, embedding, tied = policy.get_output_embeddings(), policy.get_input_embeddings(), None
        if head.weight is embedding.weight and type(embedding) is nn.Embedding:
            tied = TiedGradient()
            policy.set_input_embeddings(TiedEmbedding(embedding, tied))
        policy.set_output_embeddings(ScoringHead(head, tied))

    def hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states at the positions that predict completion tokens, (N, H)."""
        keywords: dict[str, Any] = {} if micro.packing is None else {"packing": micro.packing}
        positions = None if micro.packing is None else micro.positions
        backbone = getattr(self.policy, self.policy.base_model_prefix)
        hidden = backbone(input_ids=micro.tokens, position_ids=positions, use_cache=False, **keywords).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, micro.select_N)

    def forward(
        self, micro: MicroBatch, temperature: float, token_loss: TokenLoss | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `ScoringHead`."""
        return self.policy.get_output_embeddings()(self.hidden(micro), micro.targets_N, temperature, token_loss)


def load_policy(
    directory: Path,
    *,
    dtype: torch.dtype,
    padded: bool,
    checkpointing: bool = False,
    zero3: dict[str, Any] | None = None,
) -> nn.Module:
    """Loads a policy folder of safetensors for scoring.

    `zero3`: DeepSpeed's configuration when weights are divided over the ranks: each is as soon as it is read, so that
    no rank ever holds the whole model.

    Raises:
        DataError: the folder is not a causal language model, or one whose logits are more than a matrix product.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    attention.register()
    implementation = None if padded else attention.IMPLEMENTATION  # None: the fastest the model itself can do
    try:
        with _divided(zero3):
            policy = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, attn_implementation=implementation, use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the policy cannot be loaded: {error}") from None
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(policy.config, name, None) not in (None, 1.0):
            raise DataError(f"models with {name} are not supported: their logits are more than one matrix product")
    if not padded:
        attention.check_layers(policy.config)
    if checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


@contextmanager
def _divided(zero3: dict[str, Any] | None) -> Iterator[None]:
    """Has transformers load into DeepSpeed's parts, as it does when its own trainer runs ZeRO 3."""
    if zero3 is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(zero3)  # transformers holds it by a weak reference
    _hand_back_from(1 << 20)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept
        _hand_back_from(32 << 20)


def _hand_back_from(size: int) -> None:
    """Has glibc give freed memory of that many bytes back at once: between parts that stay, whole weights come and go,
    and the holes they leave would add up to the model. Other C libraries have no such switch.
    """
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)


def trainable(model: ScoringModel) -> dict[Tensor, str]:
    """Parameters that train, and their names in the policy's files; a tied one has one name, a critic's a prefix."""
    named = [*model.policy.named_parameters()]
    if hasattr(model, "critic"):
        named += [(f"critic.{name}", parameter) for name, parameter in model.critic.named_parameters()]
    return {parameter: name for name, parameter in named if parameter.requires_grad}


@contextmanager
def scoring(model: nn.Module) -> Iterator[Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """No gradients, no dropout."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)


PROBE_LENGTHS = np.array([6, 8])
"""Tokens of the two sequences that packing is checked on: short, so that the check costs next to nothing."""
PROBE_TOLERANCE = {torch.float32: 1e-3}
"""Mean difference of log-probabilities, nats, that rounding may make; 0.1 for types of half precision."""


def check_packing(model: nn.Module, batch: Batch, device: torch.device) -> None:
    """Scores two short sequences packed, and each alone by the model's own plain attention; every rank calls.

    Raises:
        DataError: the two disagree, so something in the model looks across the boundaries of packed sequences.
    """
    ends = np.cumsum(PROBE_LENGTHS)
    tokens = np.resize(np.concatenate([batch.prompt_ids[: ends[-1]], batch.completion_ids[: ends[-1]]]), ends[-1])
    probe = replace(
        batch, prompt_ids=tokens[[0, ends[0]]], prompt_offsets=np.arange(3),
        completion_ids=np.delete(tokens, [0, ends[0]]), completion_offsets=np.array([0, ends[0] - 1, ends[1] - 2]),
        scored_lengths=PROBE_LENGTHS - 1,
    )  # fmt: skip
    transformer = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    with scoring(model) as score:
        packed_N = score(collate(probe, np.arange(2), padded=False, device=device), 1.0)[1]
        for module in transformer:
            module.set_attn_implementation(attention.PLAIN)
        alone = [score(collate(probe, np.array([row]), padded=True, device=device), 1.0)[1] for row in range(2)]
        for module in transformer:
            module.set_attn_implementation(attention.IMPLEMENTATION)
    difference = (packed_N - torch.cat(alone)).abs().mean().item()
    if difference > PROBE_TOLERANCE.get(next(model.parameters()).dtype, 0.1):
        raise DataError(
            f"packed sequences get log-probabilities {difference:.2g} nats from those of each alone: the policy has "
            'layers that look across their boundaries; set layout = "padded"'
        )

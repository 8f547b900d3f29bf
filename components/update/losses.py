"""Policy losses of one optimizer batch, on flat tokens, exact under any cut into micro-batches or ranks.

    N  scored completion tokens, all sequences one after another (no padding, no masked token)
    S  sequences (completions)

Every loss here is a sum over tokens with weights fixed beforehand on the host, from the whole optimizer batch:

    loss = sum_N weights_S[sequence_N] * token_loss_N

so the loss of a batch is the sum of the losses of its parts, whichever way whole sequences are dealt out to
micro-batches and ranks. (A launcher that averages gradients over ranks multiplies by the number of ranks.)
How an engine uses it, once an optimizer batch and once a micro-batch:

    totals = BatchTotals.of(lengths_S, max_completion_length)          # all ranks, dropped groups included
    weights_S = sequence_weights(loss_type, lengths_S, totals)         # numpy, float64
    ...
    policy = policy_loss(loss_type, logprobs_N, old_logprobs_N, advantages_S[sequence_N], sequence_N, num_sequences,
                         epsilon_low=..., epsilon_high=..., dual_clip=...)
    loss = combine(policy.loss_N, weights_S[sequence_N], correction_N=..., kl_N=..., beta=...,
                   entropy_N=..., entropy_coefficient=..., num_tokens=totals.num_tokens)

A padded layout becomes flat by boolean masking: `logprobs_BT[mask_BT]`, `sequence_N = mask_BT.nonzero()[:, 0]`.
A masked sequence (truncated, or of a group without signal) simply has no tokens here; whether it counts in the
normaliser is decided by `BatchTotals`, not here.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

LossType = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within ±20 (a factor of 5e8) so that one broken token cannot overflow a sum in float32."""

DEFAULT_CLIP: dict[str, tuple[float, float]] = {
    "grpo": (0.2, 0.2),  # PPO, arXiv:1707.06347; DeepSeekMath keeps it
    "dapo": (0.2, 0.28),  # arXiv:2503.14476, section 3.1 (clip-higher)
    "dr_grpo": (0.2, 0.2),  # arXiv:2503.20783
    "gspo": (3e-4, 4e-4),  # arXiv:2507.18071, section 5.1: the ratio is a geometric mean, so its range is narrow
    "cispo": (1.0, 4.0),  # no lower bound (arXiv:2506.13585); weight at most 5
}
"""(epsilon_low, epsilon_high) where the user sets none."""


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of a whole optimizer batch over all ranks: what the normalisers divide by."""

    num_sequences: int
    num_tokens: int
    max_completion_length: int

    @classmethod
    def of(cls, lengths_S: np.ndarray, max_completion_length: int) -> "BatchTotals":
        """Totals of a batch; sequence i has `lengths_S[i]` scored tokens (0: masked, still counted as a sequence)."""
        return cls(len(lengths_S), int(np.sum(lengths_S)), int(max_completion_length))


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token loss (differentiable) and what the metrics need (detached)."""

    loss_N: Tensor
    ratio_N: Tensor
    """Trainer's probability over the old one; for gspo the sequence's ratio, repeated on its tokens."""
    clipped_low_N: Tensor
    """bool: ratio below the lower bound and the lower bound holds the gradient back (A < 0; cispo: any A)."""
    clipped_high_N: Tensor
    """bool: ratio above the upper bound and the upper bound holds the gradient back (A > 0; cispo: any A)."""


def sequence_weights(loss_type: LossType, lengths_S: np.ndarray, totals: BatchTotals) -> np.ndarray:
    """Weight of each token of sequence i; constant over the sequence for every loss. Returns float64 (S,).

    grpo, gspo   1 / (S |o_i|)        mean over sequences of token means, arXiv:2402.03300 eq. 3, arXiv:2507.18071 eq. 5
    dapo, cispo  1 / sum_j |o_j|      token mean over the batch, arXiv:2503.14476 eq. 8, arXiv:2506.13585 eq. 4
    dr_grpo      1 / (S L_max)        constant: no length bias, arXiv:2503.20783 section 3.2

    `lengths_S` may be any part of the batch; S, the token sum and L_max come from `totals`. A sequence of length 0
    has weight 0, an empty batch has no weights.
    """
    lengths_S = np.asarray(lengths_S, dtype=np.float64)
    present_S = (lengths_S > 0).astype(np.float64)
    if loss_type in ("grpo", "gspo"):
        return present_S / (max(totals.num_sequences, 1) * np.maximum(lengths_S, 1.0))
    if loss_type in ("dapo", "cispo"):
        return present_S / max(totals.num_tokens, 1)
    if loss_type == "dr_grpo":
        return present_S / max(totals.num_sequences * totals.max_completion_length, 1)
    raise ValueError(f"loss_type must be one of {', '.join(get_args(LossType))}, got {loss_type!r}")


def policy_loss(
    loss_type: LossType,
    logprobs_N: Tensor,
    old_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
    *,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Token losses of `loss_type`; still to be weighted (`sequence_weights`) and summed.

    `old_logprobs_N` None: strictly on-policy, the ratio is 1 and its gradient that of the log-probability.
    `sequence_N` (int64) says which of `num_sequences` local sequences a token belongs to; only gspo reads it, and
    wants whole sequences.
    """
    old_N = logprobs_N.detach() if old_logprobs_N is None else old_logprobs_N
    log_ratio_N = logprobs_N - old_N
    if loss_type == "cispo":
        return _cispo(logprobs_N, log_ratio_N, advantages_N, epsilon_low, epsilon_high)
    if loss_type == "gspo":
        log_ratio_N = sequence_mean(log_ratio_N, sequence_N, num_sequences)[sequence_N]
    elif loss_type not in get_args(LossType):
        raise ValueError(f"loss_type must be one of {', '.join(get_args(LossType))}, got {loss_type!r}")
    return _clipped(log_ratio_N, advantages_N, epsilon_low, epsilon_high, dual_clip)


def combine(
    loss_N: Tensor,
    weights_N: Tensor,
    *,
    correction_N: Tensor | None = None,
    kl_N: Tensor | None = None,
    beta: float = 0.0,
    entropy_N: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    num_tokens: int = 0,
) -> Tensor:
    """This part's share of the batch loss (scalar):

        sum_N w_N (c_N loss_N + beta kl_N)  -  entropy_coefficient / num_tokens * sum_N entropy_N

    `correction_N` is the off-policy weight of `correction.py`; `num_tokens` the token count of the whole batch. The
    entropy bonus is always a token mean, whichever normaliser the policy loss has.
    """
    if correction_N is not None:
        loss_N = loss_N * correction_N
    if kl_N is not None and beta != 0.0:
        loss_N = loss_N + beta * kl_N
    loss = (loss_N * weights_N).sum()
    if entropy_N is not None and entropy_coefficient != 0.0:
        loss = loss - entropy_coefficient / max(num_tokens, 1) * entropy_N.sum()
    return loss


def sequence_mean(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """Mean over each sequence's tokens, (S,); 0 for a sequence without tokens. Differentiable."""
    sums_S = values_N.new_zeros(num_sequences).index_add(0, sequence_N, values_N)
    counts_S = torch.bincount(sequence_N, minlength=num_sequences).to(values_N.dtype)
    return sums_S / counts_S.clamp(min=1.0)


def _clipped(log_ratio_N: Tensor, advantages_N: Tensor, low: float, high: float, dual_clip: float | None) -> PolicyLoss:
    """-min(r A, clip(r, 1-low, 1+high) A), arXiv:1707.06347 eq. 7 with the two bounds of arXiv:2503.14476 eq. 8.

    `dual_clip` c > 1: for A < 0 the loss stops growing at -c A (arXiv:1912.09729 eq. 5), so that a token the policy
    now likes much better than the sampler did cannot dominate the batch.
    """
    ratio_N = _exp(log_ratio_N)
    bounded_N = ratio_N.clamp(1.0 - low, 1.0 + high)
    loss_N = torch.maximum(-ratio_N * advantages_N, -bounded_N * advantages_N)
    if dual_clip is not None:
        loss_N = torch.where(advantages_N < 0, torch.minimum(loss_N, -dual_clip * advantages_N), loss_N)
    ratio_N = ratio_N.detach()
    return PolicyLoss(
        loss_N,
        ratio_N,
        (ratio_N < 1.0 - low) & (advantages_N < 0),
        (ratio_N > 1.0 + high) & (advantages_N > 0),
    )


def _cispo(logprobs_N: Tensor, log_ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> PolicyLoss:
    """-sg(clip(r, 1-low, 1+high)) A log p: arXiv:2506.13585 eq. 4 and 5, in the paper's convention.

    The bounds are offsets from 1, as in the paper, verl and NeMo-RL; TRL's `epsilon_high` is the bound itself, so its
    5.0 is 4.0 here. `low` >= 1 means no lower bound, the paper's choice. No token loses its gradient.
    """
    ratio_N = _exp(log_ratio_N.detach())
    bounded_N = ratio_N.clamp(max(1.0 - low, 0.0), 1.0 + high)
    return PolicyLoss(-bounded_N * advantages_N * logprobs_N, ratio_N, ratio_N < 1.0 - low, ratio_N > 1.0 + high)


def _exp(log_ratio_N: Tensor) -> Tensor:
    return log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

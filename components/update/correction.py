"""Off-policy correction: the sampler (behaviour) and the trainer give the same token different probabilities, because
of other kernels and precisions or because the sampler is some updates behind. With
r = p_trainer(old) / p_behaviour, detached, each token loss is multiplied by a weight:

    none             1
    token_truncate   min(r_t, cap)                              truncated importance sampling (TIS)
    token_mask       r_t where floor <= r_t <= cap, else 0      masked importance sampling (MIS)
    sequence_truncate, sequence_mask    the same with R_i, the product of r_t over the sequence

Formulas and names as in TRL (`vllm_importance_sampling_mode`); TIS: Yao et al. 2025, "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training"; masks: Liu et al. 2025, "When Speed Kills Stability". The ratio is of the
log-probabilities *before* the step, so the clip of the loss and this weight never act on the same quotient.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from components.update.config import CorrectionMode
from components.update.losses import MAX_LOG_RATIO


@dataclass(frozen=True)
class Correction:
    """Detached weights and the material of the metrics."""

    weights_N: Tensor
    """Multiply the token losses by this; all ones for mode `none`."""
    ratio: Tensor
    """The weights as TRL reports them: (N,) for token modes and none, (S,) for sequence modes."""
    difference_N: Tensor
    """|log p_trainer - log p_behaviour| a token, nats; NaN where the sampler gave no log-probability."""


def off_policy_correction(
    mode: CorrectionMode,
    trainer_logprobs_N: Tensor,
    behaviour_logprobs_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
    *,
    cap: float = 3.0,
    floor: float | None = None,
) -> Correction:
    """Weights of the micro-batch's tokens; the sequence modes need whole sequences.

    A behaviour log-probability of NaN (unknown) counts as no mismatch. `floor` None: no lower bound; when truncating
    it is a lower clamp.
    """
    if mode not in get_args(CorrectionMode):
        raise ValueError(f"correction must be one of {', '.join(get_args(CorrectionMode))}, got {mode!r}")
    trainer_N = trainer_logprobs_N.detach()
    difference_N = trainer_N - behaviour_logprobs_N.to(trainer_N.dtype)
    log_ratio_N = torch.nan_to_num(difference_N, nan=0.0, posinf=MAX_LOG_RATIO, neginf=-MAX_LOG_RATIO)
    by_sequence = mode.startswith("sequence_")
    if by_sequence:
        log_ratio_N = trainer_N.new_zeros(num_sequences).index_add(0, sequence_N, log_ratio_N)
    ratio = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "none":
        return Correction(torch.ones_like(ratio), ratio, difference_N.abs())
    ratio = ratio.clamp(min=floor, max=cap) if mode.endswith("_truncate") else _mask(ratio, floor, cap)
    return Correction(ratio[sequence_N] if by_sequence else ratio, ratio, difference_N.abs())


def _mask(ratio: Tensor, floor: float | None, cap: float) -> Tensor:
    outside = ratio > cap if floor is None else (ratio > cap) | (ratio < floor)
    return ratio.masked_fill(outside, 0.0)

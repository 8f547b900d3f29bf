"""Estimators of KL(policy || reference) from samples of the policy, one number a token (Schulman, "Approximating KL
Divergence", http://joschu.net/blog/kl-approx.html). With d = log policy - log reference:

    k1 = d                     unbiased value, large variance, may be negative
    k2 = d^2 / 2               biased value; as a loss its gradient is the reverse KL's, unbiased
    k3 = exp(-d) - 1 + d       unbiased value, never negative; arXiv:2402.03300 eq. 4

Two places, two meanings (arXiv:2506.09477, arXiv:2510.01555):

* in the loss, `combine(..., kl_N=kl_estimate(kind, logprobs_N, reference_N), beta=...)`: differentiated. The gradient
  of an unbiased value need not be unbiased: plain k1 has a gradient of mean zero on-policy and does nothing but add
  noise; plain k3 (DeepSeekMath) has that of the forward KL(reference || policy); plain k2 has the reverse KL's.
  With `old_logprobs_N` the estimate is multiplied by the differentiable ratio policy / old (DeepSeek-V3.2,
  arXiv:2512.02556; TRL's `use_bias_correction_kl`): then k1 and k3 have the reverse KL's gradient, off-policy too.
* in the reward, `penalised_rewards(...)`: detached, before the advantages. k1 there is the classic RLHF penalty.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from components.update.losses import MAX_LOG_RATIO

KlKind = Literal["k1", "k2", "k3"]


def kl_estimate(
    kind: KlKind, logprobs_N: Tensor, reference_logprobs_N: Tensor, old_logprobs_N: Tensor | None = None
) -> Tensor:
    """One estimate a token, (N,), differentiable in `logprobs_N`. Log-ratios beyond ±20 are held there.

    `old_logprobs_N`: multiply by exp(logprobs - old), differentiated; on-policy give `logprobs_N.detach()`. None: not.
    """
    difference_N = (logprobs_N - reference_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        estimate_N = difference_N
    elif kind == "k2":
        estimate_N = 0.5 * difference_N.square()
    elif kind == "k3":
        estimate_N = torch.expm1(-difference_N) + difference_N
    else:
        raise ValueError(f"kl_estimator must be one of {', '.join(get_args(KlKind))}, got {kind!r}")
    if old_logprobs_N is None:
        return estimate_N
    return estimate_N * (logprobs_N - old_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def penalised_rewards(rewards_S: Tensor, kl_N: Tensor, sequence_N: Tensor, beta: float) -> Tensor:
    """Reward of each sequence minus beta times its summed KL, (S,), detached; a missing reward (NaN) stays missing."""
    sums_S = torch.zeros_like(rewards_S).index_add(0, sequence_N, kl_N.detach().to(rewards_S.dtype))
    return rewards_S - beta * sums_S

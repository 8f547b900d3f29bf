"""PPO with a critic (arXiv:1707.06347), the algorithm GRPO leaves the critic out of. Nothing of GRPO needs this module.

    N  scored completion tokens, flat, sequences one after another in order      S  sequences      T  longest sequence

    rewards_N = token_rewards(rewards_S, lengths_S, kl_N, beta)                    # reward at the end, KL on each token
    advantages_N, returns_N = gae(rewards_N, old_values_N, lengths_S, gamma=1.0, lam=1.0)
    advantages_N = whiten(advantages_N)                                            # once, over the whole batch
    policy_loss("dapo", logprobs_N, old_logprobs_N, advantages_N, ...)             # token mean, clipped
    value_loss(values_N, old_values_N, returns_N, clip=0.2)                        # weighted 1 / num_tokens and summed

The value of a token is the critic's estimate of the return *before* that token is chosen: it is read from the hidden
state the token's log-probability is computed from (the position before it), never from the token itself.
"""

import torch
from torch import Tensor, nn


class ValueHead(nn.Linear):
    """Hidden state -> value. Starts at zero, so that the first returns are not mixed with noise."""

    def __init__(self, hidden_size: int, **kwargs):
        super().__init__(hidden_size, 1, **kwargs)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        return super().forward(hidden_NH).squeeze(-1)


def token_rewards(rewards_S: Tensor, lengths_S: Tensor, kl_N: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """Reward of each token, (N,): the completion's on its last token, minus `beta` times the token's KL estimate.

    `lengths_S` int64, at least 1 each: a completion without tokens has nothing to reward and is left out beforehand.
    """
    if len(lengths_S) and int(lengths_S.min()) < 1:
        raise ValueError("every sequence needs at least one scored token: drop those of length 0 before PPO")
    rewards_N = rewards_S.new_zeros(int(lengths_S.sum()))
    rewards_N[lengths_S.cumsum(0) - 1] = rewards_S
    if kl_N is not None and beta != 0.0:
        rewards_N = rewards_N - beta * kl_N.detach().to(rewards_N.dtype)
    return rewards_N


def gae(rewards_N: Tensor, values_N: Tensor, lengths_S: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, (N,) each, detached; arXiv:1506.02438 eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}        R_t = A_t + V_t

    V and A are 0 after a sequence's last token, also after one cut off by the length limit: its reward is all it gets.
    """
    values_N = values_N.detach()
    longest = int(lengths_S.max()) if len(lengths_S) else 0
    present_ST = torch.arange(longest, device=values_N.device) < lengths_S[:, None]
    rewards_ST, values_ST = (_padded(x_N, present_ST) for x_N in (rewards_N.to(values_N.dtype), values_N))
    advantages_ST = torch.zeros_like(values_ST)
    next_value_S = next_advantage_S = values_N.new_zeros(len(lengths_S))
    for t in reversed(range(values_ST.shape[1])):  # padding lies at the end: everything there is 0 and stays 0
        delta_S = rewards_ST[:, t] + gamma * next_value_S - values_ST[:, t]
        next_advantage_S = delta_S + gamma * lam * next_advantage_S
        advantages_ST[:, t] = next_advantage_S
        next_value_S = values_ST[:, t]
    advantages_N = advantages_ST[present_ST]
    return advantages_N, advantages_N + values_N


def whiten(advantages_N: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the tokens given (the whole batch, all ranks)."""
    if advantages_N.numel() < 2:
        return advantages_N - advantages_N.mean() if advantages_N.numel() else advantages_N
    return (advantages_N - advantages_N.mean()) / (advantages_N.std() + epsilon)


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, *, clip: float | None) -> Tensor:
    """Squared error of each token's value, (N,), halved: 1/2 max((V - R)^2, (V_clip - R)^2).

    V_clip holds V within `clip` (reward units) of the value before the update, as PPO's reference code does (Huang et
    al. 2022, "The 37 Implementation Details of PPO", detail 9); None: plain squared error.
    """
    error_N = (values_N - returns_N).square()
    if clip is not None:
        held_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
        error_N = torch.maximum(error_N, (held_N - returns_N).square())
    return 0.5 * error_N


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one; NaN when all returns are equal."""
    variance = returns_N.var(correction=0) if returns_N.numel() else returns_N.new_zeros(())
    if variance == 0:
        return float("nan")
    return float(1 - (returns_N - values_N).var(correction=0) / variance)


def _padded(x_N: Tensor, present_ST: Tensor) -> Tensor:
    return x_N.new_zeros(present_ST.shape).masked_scatter(present_ST, x_N)

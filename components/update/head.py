"""Log-probabilities and entropies of chosen tokens without the logits: [tokens, vocabulary] never exists.

    N  tokens to score      H  hidden size      V  vocabulary

Two ways through the language-model head, same numbers:

    logprobs_N, entropy_N = linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0, entropy=True)

any differentiable function of them may follow; the backward pass computes the logits again, chunk by chunk. And, when
the loss of a token depends on that token alone (every loss but gspo),

    result = fused_head_loss(hidden_NH, weight_VH, targets_N, token_loss, temperature=1.0)
    result.loss.backward()

where `token_loss(logprobs_n, entropy_n, chunk: slice) -> loss_n` (already weighted) is called once a chunk; gradients
are taken in the same pass, so the logits are computed once, not twice.
"""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True)
class HeadLoss:
    """Sum of the token losses (differentiable in hidden states and weight) and what the metrics need (detached)."""

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor


def linear_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, temperature: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[target] and the entropy of that distribution, nats, float32 (float64 in float64)."""
    raise NotImplementedError


def fused_head_loss(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, token_loss: TokenLoss, *, temperature: float = 1.0
) -> HeadLoss:
    """Sum over tokens of `token_loss` with its gradients, logits computed once."""
    raise NotImplementedError

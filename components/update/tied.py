"""One gradient matrix, not two, for a weight that is both embedding and language-model head.

    V vocabulary      H hidden size

The head's gradient is [V, H]; torch would make a second such matrix for the embedding's few rows and add the two. Here
the head's waits until the embedding's backward pass, always the later of the two, has added its rows and hands it on.
With a vocabulary of 151,936 that saves 0.3 GiB at H = 512 in float32, and the time to fill and add it each micro-batch.
"""

import torch
from torch import Tensor, nn


class TiedGradient:
    """Where the head's gradient waits; shared by the head's functions and the `TiedEmbedding` of one model."""

    def __init__(self) -> None:
        self.waiting: Tensor | None = None


class TiedEmbedding(nn.Module):
    """Takes an embedding's place, with the same weight under the same name."""

    def __init__(self, embedding: nn.Embedding, tied: TiedGradient) -> None:
        super().__init__()
        self.weight, self.padding_idx, self.tied = embedding.weight, embedding.padding_idx, tied

    def forward(self, tokens: Tensor) -> Tensor:
        return _TiedEmbedding.apply(tokens, self.weight, self.padding_idx, self.tied)


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight_VH, padding_idx, tied):
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.padding_idx, ctx.tied = weight_VH.shape, padding_idx, tied
        return nn.functional.embedding(tokens, weight_VH)

    @staticmethod
    def backward(ctx, grad_rows):
        (tokens,) = ctx.saved_tensors
        gradient_VH, ctx.tied.waiting = ctx.tied.waiting, None
        if gradient_VH is None:  # no token was scored
            gradient_VH = grad_rows.new_zeros(ctx.shape)
        if ctx.padding_idx is not None:
            grad_rows = grad_rows.masked_fill((tokens == ctx.padding_idx).unsqueeze(-1), 0.0)
        rows = grad_rows.reshape(-1, ctx.shape[1]).to(gradient_VH.dtype)
        return None, gradient_VH.index_add_(0, tokens.reshape(-1), rows), None, None

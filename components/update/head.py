"""Log-probabilities and entropies of chosen tokens without the logits: [tokens, vocabulary] never exists.

    N  tokens to score      H  hidden size      V  vocabulary      n, v  tokens of a chunk, columns of a tile

Two ways through the language-model head, same numbers:

    logprobs_N, entropy_N = linear_logprobs(hidden_NH, weight_VH, targets_N, temperature=1.0)

any differentiable function of them may follow; the backward pass computes the logits again, chunk by chunk (four
matrix products in all). And, when the loss of a token depends on that token alone (every loss but gspo),

    result = fused_head_loss(hidden_NH, weight_VH, targets_N, token_loss, temperature=1.0)
    result.loss.backward()

where `token_loss(logprobs_n, entropy_n, chunk: slice) -> loss_n` (already weighted) is called once a chunk, and the
gradients are taken in the same pass: the logits are computed once, not twice (three matrix products).

Numbers are float32 (float64 for float64 inputs) from the matrix product on, whatever the inputs' type; the sums over
tokens and vocabulary are held in that type too. With p = softmax(z), z = hidden @ weight.T / temperature and
H = -sum_j p_j log p_j:

    d log p_y / dz_j = [j = y] - p_j            d H / dz_j = -p_j (log p_j + H)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from components.update.tied import TiedGradient

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]

CHUNK_BYTES = 192 * 2**20
"""Size of the one logits buffer. At a vocabulary of 151,936 this is 320 tokens in float32: enough for the matrix
products to run at full speed, a twenty-fifth of what 8,192 tokens would take."""
TILE_COLUMNS = 4096
"""Columns worked on at once on a CPU, so that a tile stays in cache between two element-wise steps."""


@dataclass(frozen=True)
class HeadLoss:
    """Sum of the token losses (differentiable in hidden states and weight) and what the metrics need (detached)."""

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor


def linear_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    tied: TiedGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), and that distribution's entropy.

    Both (N,), nats. Differentiable in hidden states and weight; what needs no gradient costs none. `tied`: the hidden
    states come from a `TiedEmbedding` of the same weight.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature)
    return _LinearLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature, chunk_bytes, tied)


def fused_head_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    tied: TiedGradient | None = None,
) -> HeadLoss:
    """Sum over tokens of `token_loss`, with its gradients taken while the logits are there.

    `token_loss` gets slices of the tokens in order and must treat each token alone; tensors it closes over (old
    log-probabilities, advantages, weights) are constants. `result.loss` can be differentiated once.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature)
    return HeadLoss(*_FusedHeadLoss.apply(hidden_NH, weight_VH, targets_N, token_loss, temperature, chunk_bytes, tied))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, temperature, chunk_bytes, tied):
        ctx.set_materialize_grads(False)
        head = _Head(hidden_NH, weight_VH, targets_N, temperature, chunk_bytes)
        logprobs_N, entropy_N, logsumexp_N = (head.empty(len(targets_N)) for _ in range(3))
        for chunk in head.chunks():
            logits_nV = head.logits(chunk)
            logprobs_N[chunk], entropy_N[chunk], logsumexp_N[chunk] = head.statistics(logits_nV, chunk)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, entropy_N, logsumexp_N)
        ctx.temperature, ctx.chunk_bytes, ctx.tied = temperature, chunk_bytes, tied
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logprobs_N, grad_entropy_N):
        if grad_logprobs_N is None and grad_entropy_N is None:
            return None, None, None, None, None, None
        hidden_NH, weight_VH, targets_N, entropy_N, logsumexp_N = ctx.saved_tensors
        head = _Head(hidden_NH, weight_VH, targets_N, ctx.temperature, ctx.chunk_bytes, ctx.needs_input_grad[:2])
        for chunk in head.chunks():
            logits_nV = head.logits(chunk)
            head.accumulate(
                logits_nV, chunk, logsumexp_N[chunk], entropy_N[chunk],
                None if grad_logprobs_N is None else grad_logprobs_N[chunk],
                None if grad_entropy_N is None else grad_entropy_N[chunk],
            )  # fmt: skip
        return *_handed_on(*head.gradients(), ctx.tied), None, None, None, None


class _FusedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, token_loss, temperature, chunk_bytes, tied):
        head = _Head(hidden_NH, weight_VH, targets_N, temperature, chunk_bytes, ctx.needs_input_grad[:2])
        logprobs_N, entropy_N = head.empty(len(targets_N)), head.empty(len(targets_N))
        loss = head.empty(()).zero_()
        for chunk in head.chunks():
            logits_nV = head.logits(chunk)
            logprobs_n, entropy_n, logsumexp_n = head.statistics(logits_nV, chunk)
            logprobs_N[chunk], entropy_N[chunk] = logprobs_n, entropy_n
            with torch.enable_grad():
                leaves = logprobs_n.requires_grad_(), entropy_n.requires_grad_()
                chunk_loss = token_loss(*leaves, chunk).sum()
                grads = torch.autograd.grad(chunk_loss, leaves, allow_unused=True)
            loss += chunk_loss.detach()
            if any(ctx.needs_input_grad[:2]):
                head.accumulate(logits_nV, chunk, logsumexp_n, entropy_n.detach(), *grads)
        ctx.gradients, ctx.tied = head.gradients(), tied
        ctx.mark_non_differentiable(logprobs_N, entropy_N)
        return loss, logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the loss of fused_head_loss can be differentiated once; use linear_logprobs instead")
        grad_hidden_NH, grad_weight_VH = ctx.gradients
        ctx.gradients = None
        for gradient in (grad_hidden_NH, grad_weight_VH):
            if gradient is not None and grad_loss.item() != 1.0:
                gradient.mul_(grad_loss.to(gradient.dtype))  # ours alone: no second V x H buffer
        return *_handed_on(grad_hidden_NH, grad_weight_VH, ctx.tied), None, None, None, None, None


def _handed_on(grad_hidden_NH: Tensor, grad_weight_VH: Tensor | None, tied: TiedGradient | None) -> tuple:
    """The gradients to give to autograd; a tied weight's waits for the embedding's."""
    if tied is None or grad_weight_VH is None:
        return grad_hidden_NH, grad_weight_VH
    tied.waiting = grad_weight_VH
    return grad_hidden_NH, None


class _Head:
    """One pass over the tokens: the logits buffer, and gradients where they are wanted."""

    def __init__(self, hidden_NH, weight_VH, targets_N, temperature, chunk_bytes, needs_grad=(False, False)):
        self.hidden_NH, self.weight_VH, self.targets_N = hidden_NH, weight_VH, targets_N
        self.temperature = temperature
        self.dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        self.tile = TILE_COLUMNS if hidden_NH.device.type == "cpu" else len(weight_VH)
        chunk_size = max(chunk_bytes // (len(weight_VH) * self.dtype.itemsize) // 64 * 64, 64)
        self.chunk_size = min(chunk_size, max(len(targets_N), 1))
        self.buffer_nV = self.empty((self.chunk_size, len(weight_VH)))
        self.scratch_nv = self.empty((self.chunk_size, min(self.tile, len(weight_VH))))
        self.grad_hidden_NH = self.empty(hidden_NH.shape) if needs_grad[0] else None
        self.grad_weight_VH = self.empty(weight_VH.shape).zero_() if needs_grad[1] else None

    def empty(self, shape) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.hidden_NH.device)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.targets_N), self.chunk_size):
            yield slice(start, min(start + self.chunk_size, len(self.targets_N)))

    def tiles(self) -> Iterator[slice]:
        for start in range(0, len(self.weight_VH), self.tile):
            yield slice(start, min(start + self.tile, len(self.weight_VH)))

    def logits(self, chunk: slice) -> Tensor:
        """Logits over temperature of the chunk, in the buffer."""
        logits_nV = self.buffer_nV[: chunk.stop - chunk.start]
        hidden_nH = self.hidden_NH[chunk]
        if self.weight_VH.dtype == self.dtype:
            return torch.mm(hidden_nH / self.temperature, self.weight_VH.t(), out=logits_nV)
        if hidden_nH.device.type == "cuda":  # tensor cores: half precision in, float32 out
            torch.mm(hidden_nH, self.weight_VH.t(), out_dtype=self.dtype, out=logits_nV)
            return logits_nV.div_(self.temperature)
        hidden_nH = hidden_nH.to(self.dtype) / self.temperature
        for tile in self.tiles():
            torch.mm(hidden_nH, self.weight_VH[tile].to(self.dtype).t(), out=logits_nV[:, tile])
        return logits_nV

    def statistics(self, logits_nV: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the targets, entropy and log-sum-exp; the logits are left as they are."""
        max_n1 = logits_nV.amax(1, keepdim=True)
        sum_n, weighted_n = logits_nV.new_zeros(len(logits_nV)), logits_nV.new_zeros(len(logits_nV))
        for tile in self.tiles():
            shifted_nv = torch.sub(logits_nV[:, tile], max_n1, out=self._scratch(logits_nV, tile))
            exp_nv = shifted_nv.exp()
            sum_n += exp_nv.sum(1)
            weighted_n += shifted_nv.mul_(exp_nv).sum(1)
        log_sum_n = sum_n.log()
        logsumexp_n = max_n1.squeeze(1) + log_sum_n
        target_n = logits_nV.gather(1, self.targets_N[chunk, None]).squeeze(1)
        return target_n - logsumexp_n, log_sum_n - weighted_n / sum_n, logsumexp_n

    def accumulate(self, logits_nV, chunk, logsumexp_n, entropy_n, grad_logprobs_n, grad_entropy_n) -> None:
        """Turn the logits into their gradient in place and add its products to the gradients."""
        scaled = [None if g is None else g / self.temperature for g in (grad_logprobs_n, grad_entropy_n)]
        for tile in self.tiles():
            self._to_gradient(logits_nV[:, tile], logsumexp_n, entropy_n, *scaled)
        if grad_logprobs_n is not None:
            rows_n = torch.arange(len(logits_nV), device=logits_nV.device)
            logits_nV[rows_n, self.targets_N[chunk]] += scaled[0]
        half_on_gpu = self.weight_VH.dtype != self.dtype and logits_nV.device.type == "cuda"
        gradient_nV = logits_nV.to(self.weight_VH.dtype) if half_on_gpu else logits_nV
        if self.grad_hidden_NH is not None:
            self._hidden_gradient(gradient_nV, chunk)
        if self.grad_weight_VH is not None:
            total_VH, hidden_nH = self.grad_weight_VH, self.hidden_NH[chunk]
            if half_on_gpu:
                torch.addmm(total_VH, gradient_nV.t(), hidden_nH, out_dtype=self.dtype, out=total_VH)
            else:
                total_VH.addmm_(gradient_nV.t(), hidden_nH.to(self.dtype))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients in the types of the inputs."""
        pairs = (self.grad_hidden_NH, self.hidden_NH), (self.grad_weight_VH, self.weight_VH)
        return tuple(None if gradient is None else gradient.to(source.dtype) for gradient, source in pairs)

    def _to_gradient(self, logits_nv, logsumexp_n, entropy_n, grad_logprobs_n, grad_entropy_n) -> None:
        """logits -> -p (g + h (log p + H)), with g, h the gradients of log-probability and entropy; the target's +g
        is added by the caller."""
        log_p_nv = logits_nv.sub_(logsumexp_n[:, None])
        if grad_entropy_n is None:
            log_p_nv.exp_().mul_(-grad_logprobs_n[:, None])
            return
        p_nv = torch.exp(log_p_nv, out=self._scratch(logits_nv, slice(0, logits_nv.shape[1])))
        log_p_nv.add_(entropy_n[:, None]).mul_(grad_entropy_n[:, None])
        if grad_logprobs_n is not None:
            log_p_nv.add_(grad_logprobs_n[:, None])
        log_p_nv.mul_(p_nv).neg_()

    def _hidden_gradient(self, gradient_nV: Tensor, chunk: slice) -> None:
        grad_nH = self.grad_hidden_NH[chunk]
        if gradient_nV.dtype == self.weight_VH.dtype == self.dtype:
            torch.mm(gradient_nV, self.weight_VH, out=grad_nH)
        elif gradient_nV.device.type == "cuda":
            torch.mm(gradient_nV, self.weight_VH, out_dtype=self.dtype, out=grad_nH)
        else:
            grad_nH.zero_()
            for tile in self.tiles():
                grad_nH.addmm_(gradient_nV[:, tile], self.weight_VH[tile].to(self.dtype))

    def _scratch(self, logits_nV: Tensor, tile: slice) -> Tensor:
        return self.scratch_nv[: len(logits_nV), : tile.stop - tile.start]


def _check(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: greedy decoding has no log-probabilities")
    if hidden_NH.shape != (len(targets_N), weight_VH.shape[1]) or hidden_NH.dtype != weight_VH.dtype:
        raise ValueError(
            f"hidden states {tuple(hidden_NH.shape)} {hidden_NH.dtype} do not fit {len(targets_N)} targets and a head "
            f"of {tuple(weight_VH.shape)} {weight_VH.dtype}: pass one row a target, in the weight's type"
        )

"""Drawing one token a row from logits, with its log-probability: the processed distribution, in float32.

# B rows, V vocabulary
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.rollout.sampler import Sampling

if TYPE_CHECKING:
    import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: SplitMix64's step
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_SLICE_ELEMENTS = 1 << 26
"""Rows are drawn in slices of about so many logits, which bounds the float64 running sums to 0.5 GiB."""


def uniform(seeds_B: "torch.Tensor", position: int) -> "torch.Tensor":
    """Number `position` of each row's own stream, in [0, 1) with 40 bits, float64, shape (B,).

    Counter-based: SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195) of seed + (position + 1) · γ,
    in wrapping int64 arithmetic, so that it is the same on every device and in every batch.
    """
    step = (_GOLDEN * (position + 1) + (1 << 63)) % (1 << 64) - (1 << 63)  # wrapped, as Python's own integers do not
    z_B = seeds_B + step
    z_B = (z_B ^ _shift(z_B, 30)) * _MIX_1
    z_B = (z_B ^ _shift(z_B, 27)) * _MIX_2
    return _shift(z_B ^ _shift(z_B, 31), 24).double() / (1 << 40)


def _shift(z_B: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Logical right shift; torch's own is arithmetic."""
    return (z_B >> bits) & ((1 << (64 - bits)) - 1)


def processed_logprobs(logits_BV: "torch.Tensor", sampling: Sampling) -> "torch.Tensor":
    """Log-probabilities of the sampling distribution, float32 (B, V); a token that is cut off has minus infinity."""
    logits_BV = logits_BV.float()
    if sampling.temperature > 0:
        logits_BV = logits_BV / sampling.temperature
        if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
            least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
        if sampling.top_p < 1:
            ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
            probs_BV = ordered_BV.softmax(-1)
            cut_BV = probs_BV.cumsum(-1) - probs_BV >= sampling.top_p  # the mass before a token suffices already
            cut_BV[:, 0] = False
            logits_BV = logits_BV.masked_fill(cut_BV.scatter(1, order_BV, cut_BV), float("-inf"))
    return logits_BV.log_softmax(-1)


@dataclass(frozen=True)
class Draw:
    """Draws by inverting the cumulative distribution: one uniform number a token, whatever the vocabulary's size."""

    sampling: Sampling

    def __call__(self, logits_BV: "torch.Tensor", uniform_B: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Token ids and log-probabilities, each (B,). A row of NaN logits gives token 0 and NaN."""
        import torch

        rows = max(1, _SLICE_ELEMENTS // logits_BV.shape[-1])
        drawn = [self._draw(*part) for part in zip(logits_BV.split(rows), uniform_B.split(rows), strict=True)]
        ids, logprobs = zip(*drawn, strict=True)
        return torch.cat(ids), torch.cat(logprobs)

    def _draw(self, logits_BV: "torch.Tensor", uniform_B: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        logprobs_BV = processed_logprobs(logits_BV, self.sampling)
        broken_B = logprobs_BV.isnan().any(-1)
        if self.sampling.temperature == 0:
            ids_B = logprobs_BV.argmax(-1)
        else:
            sums_BV = logprobs_BV.double().exp().cumsum(-1)
            target_B1 = uniform_B[:, None] * sums_BV[:, -1:]
            ids_B = torch.searchsorted(sums_BV, target_B1, right=True).squeeze(-1)
        ids_B = ids_B.masked_fill(broken_B, 0)
        chosen_B = logprobs_BV.gather(-1, ids_B[:, None]).squeeze(-1)
        return ids_B, chosen_B.masked_fill(broken_B, float("nan"))

"""What a micro-batch's tokens are trained towards: the loss of each, and the figures about it.

S completions      N completion tokens of a micro-batch, n of a chunk of them
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.update.batching import Batch
from components.update.config import UpdateSettings
from components.update.correction import Correction, off_policy_correction
from components.update.head import TokenLoss
from components.update.kl import kl_estimate
from components.update.losses import DEFAULT_CLIP, BatchTotals, PolicyLoss, combine, policy_loss
from components.update.metrics import Meter
from components.update.model import MicroBatch


@dataclass
class Columns:
    """Flat columns of the batch on the host, one entry a completion token; every rank has all of them."""

    behaviour: np.ndarray
    """float32: the sampler's log-probability."""
    old: np.ndarray | None = None
    """float32: the trainer's before the first step; None: the present ones, without a pass of their own."""
    reference: np.ndarray | None = None
    """float32: the reference model's."""
    advantages: np.ndarray | None = None
    """float32: an advantage a token; None: the completion's."""
    values: np.ndarray | None = None
    """float32: the critic's, before the first step."""
    returns: np.ndarray | None = None
    """float32: what the critic is to learn."""


@dataclass(frozen=True)
class Tokens:
    """A micro-batch's columns on the device."""

    advantages_N: Tensor
    weights_N: Tensor
    behaviour_N: Tensor
    old_N: Tensor | None
    reference_N: Tensor | None
    values_N: Tensor | None
    returns_N: Tensor | None

    @classmethod
    def of(cls, batch: Batch, columns: Columns, micro: MicroBatch, weights_S: np.ndarray) -> "Tokens":
        """Gathers the columns of the micro-batch's tokens."""
        device = micro.tokens.device

        def column(values: np.ndarray | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(np.asarray(values[micro.flat_N], np.float32)).to(device)

        def spread(values_S: np.ndarray) -> Tensor:
            return torch.from_numpy(values_S[micro.sequences].astype(np.float32)).to(device)[micro.sequence_N]

        return cls(
            spread(batch.advantages) if columns.advantages is None else column(columns.advantages), spread(weights_S),
            column(columns.behaviour), column(columns.old), column(columns.reference), column(columns.values),
            column(columns.returns),
        )  # fmt: skip


class Objective:
    """The loss that the settings describe."""

    def __init__(self, settings: UpdateSettings, *, has_old: bool) -> None:
        self.settings = settings
        low, high = DEFAULT_CLIP[settings.loss_type]
        self.epsilon_low = low if settings.epsilon_low is None else settings.epsilon_low
        self.epsilon_high = high if settings.epsilon_high is None else settings.epsilon_high
        by_sequence = settings.correction.startswith("sequence_") and not has_old
        self.each_token_alone = settings.loss_type != "gspo" and not by_sequence
        """Whether a token's loss needs no other token of its sequence; then gradients come with the forward pass."""

    def token_loss(self, micro: MicroBatch, tokens: Tokens, totals: BatchTotals, scale: float) -> TokenLoss:
        """Share of the batch's loss of a chunk of the micro-batch's tokens, times `scale`."""
        settings, correction_N = self.settings, None
        if tokens.old_N is not None:  # of whole sequences: a chunk may hold but a part of one
            correction_N = self._correction(tokens.old_N, tokens, micro, slice(None)).weights_N

        def loss(logprobs_n: Tensor, entropy_n: Tensor, chunk: slice) -> Tensor:
            old_n = None if tokens.old_N is None else tokens.old_N[chunk]
            loss_n = self._policy_loss(logprobs_n, old_n, tokens, micro, chunk).loss_N
            if correction_N is None:
                correction_n = self._correction(logprobs_n, tokens, micro, chunk).weights_N
            else:
                correction_n = correction_N[chunk]
            kl_n = self._kl(logprobs_n, old_n, tokens, chunk) if settings.kl_in == "loss" else None
            return scale * combine(
                loss_n, tokens.weights_N[chunk], correction_N=correction_n, kl_N=kl_n, beta=settings.beta,
                entropy_N=entropy_n, entropy_coefficient=settings.entropy_coefficient, num_tokens=totals.num_tokens,
            )  # fmt: skip

        return loss

    def measure(self, meter: Meter, micro: MicroBatch, tokens: Tokens, logprobs_N: Tensor, entropy_N: Tensor) -> None:
        """TRL's token figures of one micro-batch."""
        everything = slice(None)
        old_N = logprobs_N if tokens.old_N is None else tokens.old_N
        found = self._policy_loss(logprobs_N, old_N, tokens, micro, everything)
        correction = self._correction(old_N, tokens, micro, everything)
        known = ~correction.difference_N.isnan()
        difference = correction.difference_N[known]
        meter.mean("entropy", entropy_N)
        meter.mean("clip_ratio/low_mean", found.clipped_low_N)
        meter.mean("clip_ratio/high_mean", found.clipped_high_N)
        meter.mean("clip_ratio/region_mean", found.clipped_low_N | found.clipped_high_N)
        meter.mean("sampling/sampling_logp_difference/mean", difference)
        meter.max("sampling/sampling_logp_difference/max", difference)
        meter.mean("sampling/kl_k3", kl_estimate("k3", tokens.behaviour_N[known], old_N[known]))
        meter.min("sampling/importance_sampling_ratio/min", correction.ratio)
        meter.mean("sampling/importance_sampling_ratio/mean", correction.ratio)
        meter.max("sampling/importance_sampling_ratio/max", correction.ratio)
        if tokens.reference_N is not None:
            meter.mean("kl", kl_estimate(self.settings.kl_estimator, logprobs_N, tokens.reference_N))

    def _kl(self, logprobs_n: Tensor, old_n: Tensor | None, tokens: Tokens, chunk: slice) -> Tensor | None:
        if tokens.reference_N is None:
            return None
        ratio_of_n = logprobs_n.detach() if old_n is None else old_n
        return kl_estimate(
            self.settings.kl_estimator, logprobs_n, tokens.reference_N[chunk],
            ratio_of_n if self.settings.kl_ratio else None,
        )  # fmt: skip

    def _policy_loss(
        self, logprobs_n: Tensor, old_n: Tensor | None, tokens: Tokens, micro: MicroBatch, chunk: slice
    ) -> PolicyLoss:
        return policy_loss(
            self.settings.loss_type, logprobs_n, old_n, tokens.advantages_N[chunk], micro.sequence_N[chunk],
            len(micro.sequences), epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high,
            dual_clip=self.settings.dual_clip,
        )  # fmt: skip

    def _correction(self, trainer_n: Tensor, tokens: Tokens, micro: MicroBatch, chunk: slice) -> Correction:
        return off_policy_correction(
            self.settings.correction, trainer_n, tokens.behaviour_N[chunk], micro.sequence_N[chunk],
            len(micro.sequences), cap=self.settings.correction_cap, floor=self.settings.correction_floor,
        )  # fmt: skip

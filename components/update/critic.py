"""PPO's critic in the worker: a value model of the policy's size, trained beside it. Nothing of GRPO needs this module.

    N completion tokens      S completions      H hidden size

The critic's weights travel with the optimizer state, as float32 pieces of parameters named `critic.…`; the first
iteration's critic is a copy of the policy's backbone with a head of zeros.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from components.update.batching import Batch
from components.update.config import UpdateSettings
from components.update.head import TokenLoss
from components.update.kl import kl_estimate
from components.update.metrics import Meter
from components.update.model import MicroBatch, ScoringModel
from components.update.objective import Columns, Tokens
from components.update.ppo import ValueHead, explained_variance, gae, token_rewards, value_loss, whiten


class Critic(nn.Module):
    """A backbone and a value head."""

    def __init__(self, causal_model: nn.Module) -> None:
        super().__init__()
        self.backbone = getattr(causal_model, causal_model.base_model_prefix)
        self.head = ValueHead(causal_model.config.hidden_size, dtype=causal_model.dtype)

    def forward(self, micro: MicroBatch) -> Tensor:
        """Value before each completion token, (N,), float32."""
        keywords = {} if micro.packing is None else {"packing": micro.packing, "position_ids": micro.positions}
        hidden = self.backbone(input_ids=micro.tokens, use_cache=False, **keywords).last_hidden_state
        return self.head(hidden.flatten(0, 1).index_select(0, micro.select_N)).float()


class ActorCritic(ScoringModel):
    """Policy and critic as one module, so that one engine divides and steps both."""

    def __init__(self, policy: nn.Module, critic: Critic) -> None:
        super().__init__(policy)
        self.critic = critic

    def forward(
        self, micro: MicroBatch, temperature: float, token_loss: TokenLoss | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `ScoringModel`, and values (N,)."""
        return *super().forward(micro, temperature, token_loss), self.critic(micro)


def add_advantages(columns: Columns, batch: Batch, settings: UpdateSettings) -> tuple[Columns, dict[str, float]]:
    """Advantages and returns from the rewards and the values before the first step, over the whole batch."""
    members = np.flatnonzero(batch.keep)
    flat_N = np.concatenate(
        [np.arange(batch.scored_lengths[s]) + batch.completion_offsets[s] for s in members] or [np.zeros(0, int)]
    )
    lengths_S = torch.from_numpy(batch.scored_lengths[members])
    values_N = torch.from_numpy(columns.values[flat_N]).double()
    kl_N = None
    if columns.reference is not None and settings.kl_in == "reward":
        old_N, reference_N = (torch.from_numpy(column[flat_N]) for column in (columns.old, columns.reference))
        kl_N = kl_estimate(settings.kl_estimator, old_N, reference_N)
    rewards_N = token_rewards(torch.from_numpy(batch.rewards[members, 0]), lengths_S, kl_N, settings.beta)
    advantages_N, returns_N = gae(rewards_N, values_N, lengths_S, gamma=settings.ppo.gamma, lam=settings.ppo.gae_lambda)
    figures = {"critic/explained_variance": explained_variance(values_N, returns_N)}
    if settings.ppo.whiten_advantages:
        advantages_N = whiten(advantages_N)
    size = len(columns.behaviour)
    found = replace(columns, advantages=_spread(advantages_N, flat_N, size), returns=_spread(returns_N, flat_N, size))
    return found, {name: value for name, value in figures.items() if value == value}


def critic_loss(values_N: Tensor, tokens: Tokens, settings: UpdateSettings, num_tokens: int, meter: Meter) -> Tensor:
    """The critic's share of the batch's loss."""
    losses_N = value_loss(values_N, tokens.values_N, tokens.returns_N, clip=settings.ppo.value_clip)
    meter.mean("critic/loss", losses_N.detach())
    meter.mean("critic/value", values_N.detach())
    return settings.ppo.value_coefficient * losses_N.sum() / max(num_tokens, 1)


def _spread(values_N: Tensor, flat_N: np.ndarray, size: int) -> np.ndarray:
    column = np.zeros(size, dtype=np.float32)
    column[flat_N] = values_N.numpy()
    return column

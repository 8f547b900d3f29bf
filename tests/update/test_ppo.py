"""PPO's pieces against hand-worked numbers and a loop over tokens."""

import math
import random

import pytest
import torch

from components.update.ppo import ValueHead, explained_variance, gae, token_rewards, value_loss, whiten


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_token_rewards_by_hand():
    """Two completions of 2 and 1 tokens, rewards 3 and 5, KL 0.1, 0.2 | 0.3 at beta 10."""
    lengths = torch.tensor([2, 1])
    assert token_rewards(double([3, 5]), lengths).tolist() == [0.0, 3.0, 5.0]
    with_kl = token_rewards(double([3, 5]), lengths, double([0.1, 0.2, 0.3]), beta=10.0)
    assert with_kl.tolist() == pytest.approx([-1.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="length 0"):
        token_rewards(double([3, 5]), torch.tensor([2, 0]))


def test_gae_by_hand():
    """Values 1, 2 | 4, rewards 0, 3 | 5, gamma 1/2, lambda 1/2:
    delta = 0 + 2/2 - 1 = 0, 3 - 2 = 1 | 1, so A = 0 + 1/4 = 1/4, 1 | 1 and R = A + V."""
    advantages, returns = gae(double([0, 3, 5]), double([1, 2, 4]), torch.tensor([2, 1]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.25, 1.0, 1.0]
    assert returns.tolist() == [1.25, 3.0, 5.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0)])
def test_gae_equals_the_sum_over_deltas(gamma, lam):
    """arXiv:1506.02438 eq. 16 as the sum it is, not as the recursion."""
    draw = random.Random(2)
    lengths = [4, 1, 6]
    rewards = [[draw.gauss(0, 1) for _ in range(n)] for n in lengths]
    values = [[draw.gauss(0, 1) for _ in range(n)] for n in lengths]
    expected = []
    for reward, value in zip(rewards, values, strict=True):
        ahead = [*value[1:], 0.0]
        delta = [r + gamma * v1 - v for r, v, v1 in zip(reward, value, ahead, strict=True)]
        expected += [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]
    flat = [double([x for row in rows for x in row]) for rows in (rewards, values)]
    advantages, returns = gae(*flat, torch.tensor(lengths), gamma=gamma, lam=lam)
    assert advantages.tolist() == pytest.approx(expected, rel=1e-12)
    if gamma == lam == 1.0:  # then the return is the reward to go, whatever the critic says
        to_go = [sum(row[t:]) for row in rewards for t in range(len(row))]
        assert returns.tolist() == pytest.approx(to_go, rel=1e-12)


def test_gae_of_nothing():
    advantages, returns = gae(double([]), double([]), torch.zeros(0, dtype=torch.int64), gamma=1.0, lam=1.0)
    assert advantages.shape == returns.shape == whiten(advantages).shape == (0,)


def test_value_loss_by_hand():
    """Return 2. From 0 to 1: error 1, held at 0.5 the error is 2.25, the larger counts. From 0 to 0.25: not held.
    From 5 to 3: held at 4.5, error 6.25. Halved."""
    values, old, returns = double([1.0, 0.25, 3.0]), double([0.0, 0.0, 5.0]), double([2.0, 2.0, 2.0])
    assert value_loss(values, old, returns, clip=0.5).tolist() == [2.25 / 2, 1.75**2 / 2, 6.25 / 2]
    assert value_loss(values, old, returns, clip=None).tolist() == [0.5, 1.75**2 / 2, 0.5]
    values = values.requires_grad_()
    value_loss(values, old, returns, clip=0.5).sum().backward()
    assert values.grad.tolist() == [0.0, -1.75, 0.0]  # held values get no gradient
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, clip=0.5), values)


def test_whiten_and_explained_variance():
    white = whiten(double([1.0, 2.0, 6.0]))
    assert white.mean().item() == pytest.approx(0, abs=1e-12) and white.std().item() == pytest.approx(1, rel=1e-6)
    assert whiten(double([3.0])).tolist() == [0.0]
    assert torch.isfinite(whiten(double([3.0, 3.0]))).all()
    returns = double([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(double([7.0, 7.0, 7.0]), returns) == 0.0
    assert math.isnan(explained_variance(returns, double([1.0, 1.0, 1.0])))


def test_value_head_starts_at_zero_and_learns():
    torch.manual_seed(0)
    head, hidden = ValueHead(8), torch.randn(5, 8)
    assert head(hidden).tolist() == [0.0] * 5
    value_loss(head(hidden), torch.zeros(5), torch.ones(5), clip=None).sum().backward()
    assert head.weight.grad.abs().sum() > 0

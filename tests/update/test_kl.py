"""KL estimators: hand-worked values, unbiasedness by exact enumeration, and the gradients they give as losses."""

import math

import pytest
import torch

from components.update.kl import kl_estimate, penalised_rewards

POLICY = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
REFERENCE = torch.tensor([0.25, 0.25, 0.4, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    # policy 0.5, reference 0.25: d = ln 2; policy 0.25, reference 0.5: d = -ln 2
    [
        ("k1", [math.log(2), -math.log(2)]),
        ("k2", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2]),
        ("k3", [0.5 - 1 + math.log(2), 2.0 - 1 - math.log(2)]),
    ],
)
def test_hand_worked_values(kind, expected):
    policy = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    reference = torch.tensor([0.25, 0.5], dtype=torch.float64).log()
    assert kl_estimate(kind, policy, reference).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_zero_at_the_reference_and_gradcheck(kind):
    logprobs = torch.tensor([-0.1, -1.0, -5.0], dtype=torch.float64, requires_grad=True)
    assert kl_estimate(kind, logprobs, logprobs.detach()).tolist() == [0.0, 0.0, 0.0]
    reference = torch.tensor([-0.2, -0.5, -7.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(kind, x, reference), logprobs)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_value_is_unbiased(kind):
    """Expectation over the policy, by enumeration, is the divergence itself."""
    exact = sum(p * math.log(p / q) for p, q in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True))
    assert (POLICY * kl_estimate(kind, POLICY.log(), REFERENCE.log())).sum().item() == pytest.approx(exact, abs=1e-14)


def expected_gradient(kind, sampled_from=POLICY, ratio=False):
    """Gradient, by the logits, of the estimator as a loss, averaged over samples of a (constant) distribution."""
    logits = POLICY.log().clone().requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    old = sampled_from.log() if ratio else None
    (sampled_from * kl_estimate(kind, logprobs, REFERENCE.log(), old)).sum().backward()
    return logits.grad.tolist()


def test_gradients_as_losses():
    """On-policy, k2 gives the reverse KL's gradient, k1 none at all: why plain k1 is refused in the loss."""
    assert expected_gradient("k2") == pytest.approx(reverse_kl_gradient(), abs=1e-14)
    assert expected_gradient("k1") == pytest.approx([0.0] * 4, abs=1e-14)
    # k3 gives the gradient of KL(reference || policy): p - q
    assert expected_gradient("k3") == pytest.approx((POLICY - REFERENCE).tolist(), abs=1e-14)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("sampled_from", [POLICY, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)])
def test_ratio_makes_the_gradient_unbiased(kind, sampled_from):
    """Times policy / old, k1 and k3 have the reverse KL's gradient, on-policy and off."""
    assert expected_gradient(kind, sampled_from, ratio=True) == pytest.approx(reverse_kl_gradient(), abs=1e-14)


def reverse_kl_gradient():
    logits = POLICY.log().clone().requires_grad_()
    probs = torch.softmax(logits, 0)
    (probs * (probs.log() - REFERENCE.log())).sum().backward()
    return logits.grad.tolist()


def test_penalised_rewards():
    """Rewards 1, 2 and none; KL 0.1 + 0.2 | 0.4 | 0.5 at beta 10."""
    kl_N = torch.tensor([0.1, 0.2, 0.4, 0.5], dtype=torch.float64, requires_grad=True)
    rewards_S = torch.tensor([1.0, 2.0, float("nan")], dtype=torch.float64)
    penalised = penalised_rewards(rewards_S, kl_N, torch.tensor([0, 0, 1, 2]), beta=10.0)
    assert penalised[:2].tolist() == pytest.approx([-2.0, -2.0])
    assert math.isnan(penalised[2]) and not penalised.requires_grad


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate("k4", torch.zeros(1), torch.zeros(1))

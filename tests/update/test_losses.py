"""Losses against numbers worked out by hand, and against a float64 reference that loops over tokens in plain Python."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.update.kl import kl_estimate
from components.update.losses import BatchTotals, combine, policy_loss, sequence_weights

LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
MAX_LENGTH = 5

# Two completions, three tokens and one, advantages +1 and -1, clip 0.8 .. 1.28.
LENGTHS = [3, 1]
LOGPROBS = [-1.0, -2.0, -3.0, -0.5]
RATIOS = [0.5, 1.0, 1.5, 2.0]
ADVANTAGES = [1.0, -1.0]


def batch_loss(loss_type, lengths, logprobs_N, old_N, advantages_S, totals=None, **options):
    """Loss of a batch, the way an engine computes it. `options` as of `policy_loss` and `combine`."""
    lengths = np.asarray(lengths)
    totals = totals or BatchTotals.of(lengths, MAX_LENGTH)
    sequence_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.as_tensor(lengths))
    weights_S = torch.as_tensor(sequence_weights(loss_type, lengths, totals))
    clip = {name: options.pop(name) for name in ("epsilon_low", "epsilon_high", "dual_clip") if name in options}
    clip = {"epsilon_low": 0.2, "epsilon_high": 0.28} | clip
    advantages_N = torch.as_tensor(advantages_S, dtype=logprobs_N.dtype)[sequence_N]
    policy = policy_loss(loss_type, logprobs_N, old_N, advantages_N, sequence_N, len(lengths), **clip)
    return combine(policy.loss_N, weights_S[sequence_N], num_tokens=totals.num_tokens, **options), policy


def by_hand(loss_type, **options):
    logprobs_N = torch.tensor(LOGPROBS, dtype=torch.float64)
    old_N = logprobs_N - torch.tensor(RATIOS, dtype=torch.float64).log()
    loss, policy = batch_loss(loss_type, LENGTHS, logprobs_N, old_N, ADVANTAGES, **options)
    return loss.item(), policy


@pytest.mark.parametrize(
    ("loss_type", "options", "expected"),
    [
        # token losses: -0.5, -1, -1.28 (clipped) | +2 (not clipped: A < 0 and r too high)
        ("grpo", {}, ((-0.5 - 1.0 - 1.28) / 3 + 2.0) / 2),
        ("dapo", {}, (-0.5 - 1.0 - 1.28 + 2.0) / 4),
        ("dr_grpo", {}, (-0.5 - 1.0 - 1.28 + 2.0) / (2 * 5)),
        # dual clip holds the last one at 1.5
        ("grpo", {"dual_clip": 1.5}, ((-0.5 - 1.0 - 1.28) / 3 + 1.5) / 2),
        ("dapo", {"dual_clip": 1.5}, (-0.5 - 1.0 - 1.28 + 1.5) / 4),
        # a symmetric clip cuts the third at 1.2
        ("dapo", {"epsilon_high": 0.2}, (-0.5 - 1.0 - 1.2 + 2.0) / 4),
        # sequence ratios: cube root of 0.5 * 1 * 1.5, and 2
        ("gspo", {}, (-(0.75 ** (1 / 3)) + 2.0) / 2),
        ("gspo", {"epsilon_high": 0.28, "dual_clip": 1.9}, (-(0.75 ** (1 / 3)) + 1.9) / 2),
        # weights 0.8, 1, 1.28 | 1.28 times -A log p = 1, 2, 3 | -0.5
        ("cispo", {}, (0.8 * 1 + 1.0 * 2 + 1.28 * 3 - 1.28 * 0.5) / 4),
        # no lower bound, upper bound 5: the ratios themselves
        ("cispo", {"epsilon_low": 1.0, "epsilon_high": 4.0}, (0.5 * 1 + 1.0 * 2 + 1.5 * 3 - 2.0 * 0.5) / 4),
    ],
)
def test_hand_worked_numbers(loss_type, options, expected):
    assert by_hand(loss_type, **options)[0] == pytest.approx(expected, abs=1e-14)


def test_hand_worked_clip_flags():
    _, policy = by_hand("dapo")
    assert policy.clipped_low_N.tolist() == [False] * 4  # 0.5 is below 0.8, but A > 0 lets it grow
    assert policy.clipped_high_N.tolist() == [False, False, True, False]
    assert policy.ratio_N.tolist() == pytest.approx(RATIOS)
    _, policy = by_hand("cispo")
    assert policy.clipped_low_N.tolist() == [True, False, False, False]
    assert policy.clipped_high_N.tolist() == [False, False, True, True]


def test_hand_worked_extras():
    """dapo with an off-policy weight of 0.5 on token 0, KL of 0.1 a token at beta 2, entropy 3 a token at 0.01."""
    ones_N = torch.ones(4, dtype=torch.float64)
    loss, _ = by_hand(
        "dapo",
        correction_N=torch.tensor([0.5, 1.0, 1.0, 1.0], dtype=torch.float64),
        kl_N=0.1 * ones_N, beta=2.0, entropy_N=3 * ones_N, entropy_coefficient=0.01,
    )  # fmt: skip
    assert loss == pytest.approx((-0.25 - 1.0 - 1.28 + 2.0) / 4 + 2 * 0.1 - 0.01 * 3, abs=1e-14)


# --- an independent reference: plain Python, one token at a time, straight from the papers' formulas


def loop_kl(kind, policy, reference):
    q = math.exp(reference - policy)
    return {"k1": -math.log(q), "k2": math.log(q) ** 2 / 2, "k3": q - math.log(q) - 1}[kind]


def loop_loss(loss_type, sequences, low, high, dual_clip, beta, kl_kind, entropy_coefficient):
    """`sequences`: one dict a completion, with the advantage and a list of tokens (logp, old, ref, weight, entropy)."""
    num_tokens = sum(len(sequence["tokens"]) for sequence in sequences)
    total = 0.0
    for sequence in sequences:
        advantage, tokens = sequence["advantage"], sequence["tokens"]
        sequence_ratio = 1.0
        for token in tokens:
            sequence_ratio *= math.exp(token["logp"] - token["old"]) ** (1 / len(tokens))
        for token in tokens:
            ratio = sequence_ratio if loss_type == "gspo" else math.exp(token["logp"] - token["old"])
            clipped = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
            if loss_type == "cispo":
                # the clipped ratio is a constant to the gradient: the caller freezes it in `token["frozen"]`
                gain = token.get("frozen", max(clipped, 0.0)) * advantage * token["logp"]
            else:
                gain = min(ratio * advantage, clipped * advantage)
                if dual_clip is not None and advantage < 0:
                    gain = max(gain, dual_clip * advantage)
            cost = -gain * token["weight"] + beta * loop_kl(kl_kind, token["logp"], token["ref"])
            if loss_type in ("grpo", "gspo"):
                cost = cost / len(tokens) / len(sequences)
            elif loss_type == "dr_grpo":
                cost = cost / (len(sequences) * MAX_LENGTH)
            else:
                cost = cost / num_tokens
            total += cost - entropy_coefficient * token["entropy"] / num_tokens
    return total


def random_batch(seed, lengths=(4, 1, 5, 2)):
    draw = random.Random(seed)
    sequences = []
    for length in lengths:
        tokens = []
        for _ in range(length):
            logp = -draw.expovariate(0.7)
            tokens.append({
                "logp": logp, "old": logp + draw.gauss(0, 0.4), "ref": logp + draw.gauss(0, 0.3),
                "weight": draw.choice([0.0, 0.6, 1.0, 1.7]), "entropy": draw.expovariate(1.0),
            })  # fmt: skip
        sequences.append({"advantage": draw.gauss(0, 1), "tokens": tokens})
    return sequences


def tensors(sequences):
    def column(name):
        return torch.tensor([t[name] for s in sequences for t in s["tokens"]], dtype=torch.float64)

    return [len(s["tokens"]) for s in sequences], {name: column(name) for name in sequences[0]["tokens"][0]}


CASES = [
    (loss_type, dual_clip, kl_kind)
    for loss_type in LOSS_TYPES
    for dual_clip in (None, 1.6)
    for kl_kind in ("k1", "k2", "k3")
]


@pytest.mark.parametrize(("loss_type", "dual_clip", "kl_kind"), CASES)
def test_value_and_gradient_equal_the_loop_reference(loss_type, dual_clip, kl_kind):
    low, high = (0.05, 0.08) if loss_type == "gspo" else (0.2, 0.28)
    sequences = random_batch(seed=3)
    lengths, column = tensors(sequences)
    logprobs_N = column["logp"].clone().requires_grad_()
    loss, policy = batch_loss(
        loss_type, lengths, logprobs_N, column["old"], [s["advantage"] for s in sequences],
        epsilon_low=low, epsilon_high=high, dual_clip=dual_clip, correction_N=column["weight"],
        kl_N=kl_estimate(kl_kind, logprobs_N, column["ref"]), beta=0.3,
        entropy_N=column["entropy"], entropy_coefficient=0.02,
    )  # fmt: skip
    loss.backward()
    arguments = low, high, dual_clip, 0.3, kl_kind, 0.02
    assert loss.item() == pytest.approx(loop_loss(loss_type, sequences, *arguments), rel=1e-12)
    assert policy.clipped_low_N.any() or policy.clipped_high_N.any()  # the case reaches the clip

    flat = [token for sequence in sequences for token in sequence["tokens"]]
    for token in flat:
        token["frozen"] = min(max(math.exp(token["logp"] - token["old"]), 1 - low), 1 + high)
    step, expected = 1e-6, []
    for token in flat:  # central differences of the reference: no autograd on this side
        logp = token["logp"]
        token["logp"] = logp + step
        above = loop_loss(loss_type, sequences, *arguments)
        token["logp"] = logp - step
        below = loop_loss(loss_type, sequences, *arguments)
        token["logp"] = logp
        expected.append((above - below) / (2 * step))
    assert logprobs_N.grad.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_gradcheck(loss_type):
    lengths, column = tensors(random_batch(seed=11))
    advantages = [s["advantage"] for s in random_batch(seed=11)]

    def scalar(logprobs_N):
        return batch_loss(loss_type, lengths, logprobs_N, column["old"], advantages)[0]

    assert torch.autograd.gradcheck(scalar, column["logp"].clone().requires_grad_(), atol=1e-8)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("given_old", [False, True])
def test_on_policy_is_reinforce(loss_type, given_old):
    """At ratio 1 the gradient of every loss is -w A: REINFORCE with the group's baseline, under that loss's weights."""
    sequences = random_batch(seed=5)
    lengths, column = tensors(sequences)
    logprobs_N = column["logp"].clone().requires_grad_()
    old_N = column["logp"].clone() if given_old else None
    loss, policy = batch_loss(loss_type, lengths, logprobs_N, old_N, [s["advantage"] for s in sequences])
    loss.backward()
    assert policy.ratio_N.tolist() == [1.0] * sum(lengths)
    assert not policy.clipped_low_N.any() and not policy.clipped_high_N.any()
    expected = []
    for sequence in sequences:
        length = len(sequence["tokens"])
        weight = {"grpo": 1 / 4 / length, "gspo": 1 / 4 / length, "dr_grpo": 1 / (4 * MAX_LENGTH)}.get(
            loss_type, 1 / sum(lengths)
        )
        expected += [-weight * sequence["advantage"]] * length
    assert logprobs_N.grad.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "lengths", [[], [0], [0, 0, 0], [1], [0, 3, 0, 1]], ids=["empty", "masked", "all_masked", "single", "some_masked"]
)
def test_degenerate_batches_stay_finite(loss_type, lengths):
    """Empty batches, batches of masked or truncated completions only, single tokens: finite, and 0 where nothing is."""
    num_tokens = sum(lengths)
    logprobs_N = torch.full((num_tokens,), -2.0, dtype=torch.float32, requires_grad=True)
    loss, _ = batch_loss(loss_type, np.array(lengths, dtype=np.int64), logprobs_N, None, [1.5] * len(lengths))
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logprobs_N.grad).all()
    if num_tokens == 0:
        assert loss.item() == 0.0
    else:
        assert (logprobs_N.grad != 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_ratios_stay_finite_in_float32(loss_type):
    logprobs_N = torch.tensor([-1e4, -0.1, -300.0], requires_grad=True)
    loss, _ = batch_loss(loss_type, [3], logprobs_N, torch.tensor([-0.1, -1e4, -0.1]), [-2.0])
    loss = loss + kl_estimate("k3", logprobs_N, torch.tensor([-0.1, -1e4, -0.1])).sum()
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logprobs_N.grad).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=9),
    loss_type=st.sampled_from(LOSS_TYPES),
    parts=st.integers(1, 9),
)
def test_invariant_to_cutting_and_order(seed, lengths, loss_type, parts):
    """Whole sequences dealt out to any number of parts in any order: same loss, same gradient (float64, 1e-12)."""
    draw = random.Random(seed)
    num_tokens = sum(lengths)
    values = torch.tensor([[draw.gauss(-1, 1), draw.gauss(-1, 1)] for _ in range(num_tokens)], dtype=torch.float64)
    values = values.reshape(num_tokens, 2)
    advantages = [draw.gauss(0, 1) for _ in lengths]
    logprobs_N = values[:, 0].clone().requires_grad_()
    loss, _ = batch_loss(
        loss_type, np.array(lengths), logprobs_N, values[:, 1], advantages,
        kl_N=kl_estimate("k3", logprobs_N, values[:, 1]), beta=0.1, entropy_N=values[:, 1], entropy_coefficient=0.1,
    )  # fmt: skip
    loss.backward()

    totals = BatchTotals.of(np.array(lengths), MAX_LENGTH)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    owner = [draw.randrange(parts) for _ in lengths]
    again_N = values[:, 0].clone().requires_grad_()
    total = 0.0
    for part in range(parts):
        mine = [i for i in range(len(lengths)) if owner[i] == part]
        draw.shuffle(mine)
        index_n = torch.tensor([n for i in mine for n in range(starts[i], starts[i + 1])], dtype=torch.int64)
        share, _ = batch_loss(
            loss_type, np.array([lengths[i] for i in mine], dtype=int), again_N[index_n], values[index_n, 1],
            [advantages[i] for i in mine], totals=totals, kl_N=kl_estimate("k3", again_N[index_n], values[index_n, 1]),
            beta=0.1, entropy_N=values[index_n, 1], entropy_coefficient=0.1,
        )  # fmt: skip
        share.backward()
        total += share.item()
    assert total == pytest.approx(loss.item(), rel=1e-12, abs=1e-12)
    assert again_N.grad.tolist() == pytest.approx(logprobs_N.grad.tolist(), rel=1e-12, abs=1e-12)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss_type must be one of grpo, dapo"):
        sequence_weights("ppo", np.array([1]), BatchTotals(1, 1, 1))
    with pytest.raises(ValueError, match="got 'bnpo'"):
        policy_loss("bnpo", *[torch.zeros(1)] * 3, torch.zeros(1, dtype=torch.int64), 1, epsilon_low=0, epsilon_high=0)

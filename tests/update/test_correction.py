"""Off-policy weights against hand-worked numbers and a loop over tokens."""

import math
import random

import pytest
import torch

from components.update.correction import off_policy_correction

# Ratios of two sequences: 0.5, 4, 1 (product 2) | 2, 2 (product 4)
RATIOS = [0.5, 4.0, 1.0, 2.0, 2.0]
SEQUENCE = torch.tensor([0, 0, 0, 1, 1])


def correction(mode, ratios=RATIOS, **options):
    behaviour = torch.full((len(ratios),), -3.0, dtype=torch.float64)
    trainer = behaviour + torch.tensor(ratios, dtype=torch.float64).log()
    return off_policy_correction(mode, trainer, behaviour, SEQUENCE, 2, **options)


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("none", {"cap": 3.0}, [1, 1, 1, 1, 1]),
        ("token_truncate", {"cap": 3.0}, [0.5, 3, 1, 2, 2]),
        ("token_truncate", {"cap": 1.5, "floor": 0.7}, [0.7, 1.5, 1, 1.5, 1.5]),
        ("token_mask", {"cap": 3.0}, [0.5, 0, 1, 2, 2]),
        ("token_mask", {"cap": 3.0, "floor": 0.6}, [0, 0, 1, 2, 2]),
        ("sequence_truncate", {"cap": 3.0}, [2, 2, 2, 3, 3]),
        ("sequence_truncate", {"cap": 5.0, "floor": 3.0}, [3, 3, 3, 4, 4]),
        ("sequence_mask", {"cap": 3.0}, [2, 2, 2, 0, 0]),
        ("sequence_mask", {"cap": 5.0, "floor": 3.0}, [0, 0, 0, 4, 4]),
    ],
)
def test_hand_worked_weights(mode, options, expected):
    assert correction(mode, **options).weights_N.tolist() == pytest.approx(expected, rel=1e-12)


def test_what_the_figures_are_made_of():
    result = correction("token_truncate", cap=3.0)
    assert result.difference_N.tolist() == pytest.approx([math.log(2) * n for n in (1, 2, 0, 1, 1)])
    assert result.ratio.tolist() == pytest.approx([0.5, 3, 1, 2, 2])
    by_sequence = correction("sequence_mask", cap=3.0)
    assert by_sequence.ratio.tolist() == pytest.approx([2.0, 0.0])


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_equals_a_loop(mode):
    draw = random.Random(4)
    lengths = [3, 0, 7, 1]
    trainer = [[draw.gauss(-2, 1) for _ in range(n)] for n in lengths]
    behaviour = [[x + draw.gauss(0, 0.6) for x in row] for row in trainer]
    expected = []
    for ours, theirs in zip(trainer, behaviour, strict=True):
        product = math.prod(math.exp(a - b) for a, b in zip(ours, theirs, strict=True))
        for a, b in zip(ours, theirs, strict=True):
            ratio = product if mode.startswith("sequence") else math.exp(a - b)
            if mode.endswith("truncate"):
                expected.append(min(max(ratio, 0.4), 1.8))
            else:
                expected.append(ratio if 0.4 <= ratio <= 1.8 else 0.0)
    flat = [torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (trainer, behaviour)]
    sequence_N = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    result = off_policy_correction(mode, *flat, sequence_N, 4, cap=1.8, floor=0.4)
    assert result.weights_N.tolist() == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) > 2


@pytest.mark.parametrize("mode", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_unknown_and_broken_behaviour_logprobs(mode):
    """NaN is no mismatch, infinities are held, nothing is differentiated, an empty batch is nothing."""
    trainer = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([float("nan"), -1.0, float("-inf")])
    result = off_policy_correction(mode, trainer, behaviour, torch.tensor([0, 0, 1]), 2, cap=3.0)
    assert result.weights_N[:2].tolist() == [1.0, 1.0]
    assert torch.isfinite(result.weights_N).all() and not result.weights_N.requires_grad
    empty = off_policy_correction(mode, trainer[:0], behaviour[:0], torch.zeros(0, dtype=torch.int64), 0)
    assert empty.weights_N.shape == (0,) and empty.difference_N.shape == (0,)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="token_truncate, token_mask, sequence_truncate, sequence_mask"):
        correction("clip")

"""Advantages against hand-worked numbers and against `statistics` of the standard library, group by group."""

import math
import random
import statistics

import numpy as np
import pytest

from components.common.errors import DataError
from components.update.advantages import EPSILON, group_advantages
from components.update.batching import Batch
from components.update.config import UpdateSettings
from components.update.shaping import overlong_penalty, scored_lengths
from components.update.weighting import add_advantages, shape_rewards

NONE = float("nan")
# Group 7: 1, 0, 0, 1 (mean 1/2, std sqrt(1/3)); group 3: 2, 5 (mean 7/2, std 3/sqrt 2)
REWARDS = [1.0, 0.0, 0.0, 1.0, 2.0, 5.0]
GROUPS = [7, 7, 7, 7, 3, 3]
STD_A, STD_B = math.sqrt(1 / 3), 3 / math.sqrt(2)
STD_ALL = math.sqrt((0.25 + 2.25 + 2.25 + 0.25 + 0.25 + 12.25) / 5)  # mean 3/2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5 / (STD_A + 1e-4), -0.5 / (STD_A + 1e-4)] * 1 + [-0.5 / (STD_A + 1e-4), 0.5 / (STD_A + 1e-4)]
         + [-1.5 / (STD_B + 1e-4), 1.5 / (STD_B + 1e-4)]),
        ({"scale": "none"}, [0.5, -0.5, -0.5, 0.5, -1.5, 1.5]),
        ({"scale": "batch"}, [x / (STD_ALL + 1e-4) for x in (0.5, -0.5, -0.5, 0.5, -1.5, 1.5)]),
        # the others' means: 1/3, 2/3, 2/3, 1/3 | 5, 2
        ({"scale": "none", "baseline": "leave_one_out"}, [2 / 3, -2 / 3, -2 / 3, 2 / 3, -3.0, 3.0]),
        ({"scale": "none", "epsilon": 0.0}, [0.5, -0.5, -0.5, 0.5, -1.5, 1.5]),
    ],
)  # fmt: skip
def test_hand_worked(options, expected):
    result = group_advantages(np.array(REWARDS), np.array(GROUPS), **options)
    assert result.advantages_S.tolist() == pytest.approx(expected, abs=1e-14)
    assert result.keep_S.all() and result.frac_reward_zero_std == 0.0


def test_groups_without_signal_are_flagged():
    """Equal rewards (also equal only up to rounding), one scored member, none scored: dropped, never a raw score."""
    rewards = [1.0, 1.0, 0.1 + 0.2, 0.3, 5.0, NONE, NONE, NONE, 0.0, 1.0]
    groups = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for scale in ("group", "batch", "none"):
        result = group_advantages(np.array(rewards), np.array(groups), scale=scale)
        assert result.keep_S.tolist() == [False] * 8 + [True] * 2
        assert result.advantages_S[:8].tolist() == [0.0] * 8
        assert np.isfinite(result.advantages_S).all()
        assert result.frac_reward_zero_std == 0.8


def test_a_group_that_lost_a_member():
    """Rewards 1, none, 4: mean 2.5 of those present; the unscored one is dropped."""
    result = group_advantages(np.array([1.0, NONE, 4.0]), np.array([0, 0, 0]), scale="none")
    assert result.advantages_S.tolist() == [-1.5, 0.0, 1.5]
    assert result.keep_S.tolist() == [True, False, True]
    assert math.isnan(result.rewards_S[1])


def test_several_columns_sum_then_normalise():
    """Weights 1 and 10; a function that did not apply adds nothing: totals 1, 20 | unscored."""
    columns = np.array([[1.0, 0.0], [NONE, 2.0], [NONE, NONE]])
    result = group_advantages(columns, np.zeros(3), reward_weights=np.array([1.0, 10.0]), scale="none")
    assert result.rewards_S[:2].tolist() == [1.0, 20.0] and math.isnan(result.rewards_S[2])
    assert result.advantages_S.tolist() == [-9.5, 9.5, 0.0]


def test_gdpo_keeps_columns_apart():
    """arXiv:2601.05242's point: totals (0, 2) and (0, 1) normalise alike, columns normalised by themselves do not."""
    columns = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    groups = np.array([0, 0, 1, 1])
    summed = group_advantages(columns, groups)
    assert summed.advantages_S[1] == pytest.approx(summed.advantages_S[3], rel=1e-3)
    apart = group_advantages(columns, groups, combine="normalize_then_sum")
    # each varying column gives -+0.5 / (sqrt(1/2) + eps); group 0 has two of them, group 1 one
    unit = 0.5 / (math.sqrt(0.5) + EPSILON)
    sums = [-2 * unit, 2 * unit, -unit, unit]
    expected = [x / (statistics.stdev(sums) + EPSILON) for x in sums]
    assert apart.advantages_S.tolist() == pytest.approx(expected, abs=1e-14)


def loop_reference(rewards, groups, scale, baseline):
    present = [r for r in rewards if not math.isnan(r)]
    result = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        members = [(j, r) for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group]
        members = [(j, r) for j, r in members if not math.isnan(r)]
        values = [r for _, r in members]
        if math.isnan(reward) or len(values) < 2 or len(set(values)) == 1:
            result.append(0.0)
            continue
        others = [r for j, r in members if j != i] if baseline == "leave_one_out" else values
        spread = statistics.stdev(values) if scale == "group" else statistics.stdev(present)
        spread = 1.0 if scale == "none" else spread + EPSILON
        result.append((reward - statistics.fmean(others)) / spread)
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equals_a_loop(scale, baseline):
    draw = random.Random(8)
    groups = [draw.randrange(9) for _ in range(60)]
    rewards = [draw.choice([0.0, 1.0, draw.gauss(0, 3), NONE]) for _ in groups]
    result = group_advantages(np.array(rewards), np.array(groups), scale=scale, baseline=baseline)
    expected = loop_reference(rewards, groups, scale, baseline)
    assert result.advantages_S.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_empty_and_wrong_input():
    empty = group_advantages(np.zeros(0), np.zeros(0))
    assert empty.advantages_S.shape == (0,) and empty.frac_reward_zero_std == 0.0
    with pytest.raises(ValueError, match="3 numbers for 2 completions"):
        group_advantages(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="2 reward columns need 2 weights, got 3"):
        group_advantages(np.zeros((4, 2)), np.zeros(4), reward_weights=np.ones(3))
    with pytest.raises(DataError, match="infinite"):
        group_advantages(np.array([1.0, np.inf]), np.zeros(2))


def test_overlong_penalty():
    """Limit 10, buffer 4: free up to 6 tokens, then a quarter a token."""
    lengths = np.array([0, 6, 7, 8, 10, 12])
    assert overlong_penalty(lengths, 10, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalty(lengths, 10, 0).tolist() == [0.0] * 6
    with pytest.raises(ValueError, match="got 11"):
        overlong_penalty(lengths, 10, 11)


def test_scored_lengths():
    lengths, truncated = np.array([3, 5, 5]), np.array([False, True, False])
    assert scored_lengths(lengths, truncated, mask_truncated=True).tolist() == [3, 0, 5]
    assert scored_lengths(lengths, truncated, mask_truncated=False).tolist() == [3, 5, 5]


def test_a_completion_without_a_reward_is_not_punished_for_its_length():
    """Two functions and the over-length column: who has no reward of the two has none of the third either."""
    batch = Batch(
        prompt_ids=np.zeros(6, np.int32), prompt_offsets=np.arange(7), completion_ids=np.zeros(60, np.int32),
        completion_offsets=np.array([0, 12, 22, 32, 40, 48, 60]), behaviour_logprobs=np.zeros(60, np.float32),
        group=np.array([0, 0, 0, 0, 1, 1]), truncated=np.zeros(6, bool), advantages=np.zeros(6),
        rewards=np.array([[NONE, NONE], [1, 0], [0, 1], [1, 1], [NONE, NONE], [NONE, NONE]]),
        scored_lengths=np.full(6, 10), keep=np.zeros(6, bool),
    )  # fmt: skip
    settings = UpdateSettings(reward_combination="normalize_then_sum", overlong_buffer=5)
    found, figures = add_advantages(shape_rewards(batch, settings, 12), settings, (1.0, 1.0))
    assert found.keep.tolist() == [False, True, True, True, False, False]
    assert found.advantages[[0, 4, 5]].tolist() == [0.0] * 3
    assert figures["num_groups_dropped"] == 1 and figures["num_completions_trained"] == 3
    # penalties -3/5, -3/5, 0 of lengths 10, 10, 8; columns normalised, summed, over the batch's deviation
    columns = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [-0.6, -0.6, 0.0]]
    normal = [[(x - statistics.mean(c)) / (statistics.stdev(c) + EPSILON) for x in c] for c in columns]
    sums = [sum(row) for row in zip(*normal, strict=True)]
    assert found.advantages[1:4].tolist() == pytest.approx([x / (statistics.stdev(sums) + EPSILON) for x in sums])

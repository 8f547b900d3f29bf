"""pass@k, maj@k and intervals against values worked out by hand or by enumeration."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.common.bootstrap import intervals, paired_difference
from components.evaluate.metrics import Samples, deciding, evaluate, gain_over, maj_at_k, pass_at_k, usable_ks


def samples(name, right, answers=None, lengths=None, truncated=None):
    count = len(right)
    return Samples(
        prompt_id=name,
        right=right,
        answers=answers or [str(one) for one in right],
        lengths=lengths or [3] * count,
        truncated=truncated or [False] * count,
        rewards=[float(one) for one in right],
    )


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(right, k):
    if k > len(right):
        return
    subsets = list(combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_the_paper():
    # 1 - C(190, 100) / C(200, 100), with exact integers
    from math import comb

    assert pass_at_k(200, 10, 100) == pytest.approx(1 - comb(190, 100) / comb(200, 100), rel=1e-12)


def test_pass_at_1_is_the_share_of_right_samples():
    assert pass_at_k(4, 3, 1) == pytest.approx(0.75)


def test_the_majority_decides():
    assert maj_at_k([True, True, False], ["4", "4", "5"], 3) == 1.0
    assert maj_at_k([True, False, False], ["4", "5", "5"], 3) == 0.0


def test_tied_answers_share_the_vote():
    assert maj_at_k([True, False], ["4", "5"], 2) == 0.5
    assert maj_at_k([True, False, False], ["4", "5", "6"], 3) == pytest.approx(1 / 3)


def test_maj_at_k_below_n_is_the_mean_over_subsets():
    # of the three pairs of 4, 4, 5: {4,4} is right, the two {4,5} are ties
    assert maj_at_k([True, True, False], ["4", "4", "5"], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_many_subsets_are_drawn_and_come_near_the_mean_over_all():
    right, answers = [True] * 6 + [False] * 6, ["4"] * 6 + ["5", "5", "5", "6", "7", "8"]
    exact = np.mean([_vote(right, answers, subset) for subset in combinations(range(12), 4)])
    drawn = maj_at_k(right, answers, 4, seed=1)  # C(12, 4) = 495 subsets, 100 drawn
    assert drawn == pytest.approx(exact, abs=4 * 0.5 / 100**0.5)
    assert drawn == maj_at_k(right, answers, 4, seed=1)


def _vote(right, answers, subset):
    counts = {answer: sum(answers[i] == answer for i in subset) for answer in answers}
    best = [answer for answer in counts if counts[answer] == max(counts.values())]
    return np.mean([any(right[i] and answers[i] == answer for i in subset) for answer in best])


def test_all_metrics_of_two_prompts_by_hand():
    found = evaluate(
        [
            samples("a", [True, True, False, False], ["1", "1", "2", "3"], [2, 4, 6, 8], [False, False, False, True]),
            samples("b", [False] * 4, ["9"] * 4, [5] * 4),
        ],
        (2, 4, 16),
        resamples=500,
        seed=0,
    )
    metrics = found.metrics
    assert metrics["eval/pass@1"] == pytest.approx(0.25)
    assert metrics["eval/pass@2"] == pytest.approx((1 - 1 / 6) / 2)  # one of the six pairs of a has no right sample
    assert metrics["eval/pass@4"] == pytest.approx(0.5)
    assert metrics["eval/maj@4"] == pytest.approx(0.5)
    assert metrics["eval/completions/mean_length"] == pytest.approx(5.0)
    assert metrics["eval/completions/clipped_ratio"] == pytest.approx(1 / 8)
    assert metrics["eval/reward"] == pytest.approx(0.25)
    assert (metrics["eval/num_prompts"], metrics["eval/num_samples"]) == (2, 8)
    assert "eval/pass@16" not in metrics
    assert set(deciding((2, 4, 16), 4)) < set(metrics)
    assert found.per_prompt["eval/pass@1"] == {"a": 0.5, "b": 0.0}
    # of two prompts a resample has the mean 0, 0.25 or 0.5, the ends each with chance 1/4
    assert (metrics["eval/pass@1_low"], metrics["eval/pass@1_high"]) == (0.0, 0.5)


def test_no_samples_no_metrics():
    assert evaluate([], (1,), resamples=100, seed=0).metrics == {}


def test_k_beyond_the_samples_is_left_out():
    assert usable_ks((4, 8), 6) == [1, 4]


def test_interval_agrees_with_an_independent_implementation():
    from scipy.stats import bootstrap

    values = np.random.default_rng(5).binomial(8, 0.4, size=200) / 8
    low, high = intervals(values[:, None], resamples=20_000, seed=0)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert low[0] == pytest.approx(theirs.low, abs=0.003)
    assert high[0] == pytest.approx(theirs.high, abs=0.003)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = intervals(rng.binomial(1, 0.6, size=(80, 1)), resamples=300, seed=seed)
        covered += low[0] <= 0.6 <= high[0]
    assert 0.90 <= covered / 300 <= 0.98


def test_interval_is_seeded_and_does_not_depend_on_memory_chunks(monkeypatch):
    values = np.random.default_rng(1).random((40, 2))
    whole = intervals(values, resamples=150, seed=7)
    monkeypatch.setattr("components.common.bootstrap._CELLS_AT_A_TIME", 1000)
    in_parts = intervals(values, resamples=150, seed=7)
    np.testing.assert_allclose(whole, in_parts)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(2)
    hardness = rng.random(100)
    before = {str(i): float(hardness[i]) for i in range(100)}
    after = {str(i): float(hardness[i] + 0.05 + 0.01 * rng.standard_normal()) for i in range(100)}
    difference, low, high = paired_difference(after, before, resamples=1000, seed=0)
    assert difference == pytest.approx(np.mean([after[i] - before[i] for i in before]))
    assert low > 0.04
    assert high < 0.06


def test_gain_counts_shared_prompts_only():
    now = evaluate([samples("a", [True, True]), samples("new", [False, False])], (1,), resamples=100, seed=0)
    gain = gain_over(now, {"eval/pass@1": {"a": 0.5, "old": 1.0}}, resamples=100, seed=0)
    assert gain["eval/pass@1_gain"] == pytest.approx(0.5)
    assert gain_over(now, {"eval/pass@1": {"old": 1.0}}, resamples=100, seed=0) == {}

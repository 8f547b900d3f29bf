"""Every prompt once an epoch, whatever the numbers of prompts, iterations, runs and shards."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.common.errors import DataError
from components.rollout.prompts import choose, share


@st.composite
def fine_tunes(draw):
    num_train = draw(st.integers(1, 40))
    num_prompts = draw(st.integers(1, num_train))
    return {
        "names": [f"prompt {number}" for number in range(num_train)],
        "num_prompts": num_prompts,
        "seed": draw(st.integers(0, 2**31)),
        "iterations": draw(st.integers(1, 30)),
        "shards": draw(st.integers(1, 5)),
    }


@settings(max_examples=150, deadline=None)
@given(fine_tunes())
def test_no_prompt_is_skipped_or_repeated(case):
    drawn = []
    for iteration in range(case["iterations"]):  # each worked out from nothing, as a resumed or later run does
        rows = choose(case["names"], seed=case["seed"], num_prompts=case["num_prompts"], iteration=iteration)
        assert len(rows) == len(set(rows)) == case["num_prompts"]
        shares = [share(rows, shard, case["shards"]) for shard in range(case["shards"])]
        assert sorted(row for part in shares for row in part) == sorted(rows)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        drawn += rows
        counts = Counter(dict.fromkeys(range(len(case["names"])), 0))
        counts.update(drawn)
        assert max(counts.values()) - min(counts.values()) <= 1, "a prompt came again before another had its turn"


@settings(max_examples=50, deadline=None)
@given(fine_tunes())
def test_the_order_of_rows_does_not_matter(case):
    names = case["names"]
    arguments = {"seed": case["seed"], "num_prompts": case["num_prompts"], "iteration": case["iterations"]}
    forward = [names[row] for row in choose(names, **arguments)]
    backward = names[::-1]
    assert [backward[row] for row in choose(backward, **arguments)] == forward


def test_epochs_and_seeds_have_orders_of_their_own():
    names = [str(number) for number in range(100)]
    epochs = [choose(names, seed=5, num_prompts=100, iteration=epoch) for epoch in range(3)]
    epochs.append(choose(names, seed=6, num_prompts=100, iteration=0))
    assert all(sorted(order) == list(range(100)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4


def test_the_first_places_are_taken_evenly():
    names = [str(number) for number in range(10)]
    firsts = Counter(choose(names, seed=seed, num_prompts=1, iteration=0)[0] for seed in range(2000))
    chi_squared = sum((firsts[row] - 200) ** 2 / 200 for row in range(10))
    assert chi_squared < 27.88  # 9 degrees of freedom, p = 0.001


def test_too_few_prompts_are_refused():
    with pytest.raises(DataError, match=r"rollout.num_prompts = 5, but there are 4 train prompts: set it to 4 or less"):
        choose(list("abcd"), seed=0, num_prompts=5, iteration=0)


def test_a_shard_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="shard 2 of 2"):
        share([1, 2, 3], 2, 2)

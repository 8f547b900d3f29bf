"""Batches, optimizer steps and micro-batches on the host."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.update.batching import Batch, cut, deal, plan_steps
from components.update.config import UpdateSettings
from components.update.engine import learning_rate_share
from components.update.model import collate

lengths = st.lists(st.integers(1, 60), max_size=40).map(np.array)


@given(lengths, st.integers(1, 4), st.integers(20, 300), st.booleans())
def test_every_sequence_is_in_one_micro_batch_within_the_budget(lengths, ranks, budget, padded):
    parts = cut(np.arange(len(lengths)), lengths, budget, multiple=ranks, padded=padded)
    assert len(parts) % ranks == 0
    assert sorted(sequence for part in parts for sequence in part) == list(range(len(lengths)))
    for part in parts:
        cost = lengths[part].max(initial=0) * len(part) if padded else lengths[part].sum()
        assert cost <= budget or len(part) == 1
    dealt = deal(parts, lengths, ranks)
    assert len({len(rank) for rank in dealt}) == 1


def test_micro_batches_are_as_few_and_as_even_as_can_be():
    parts = cut(np.arange(8), np.array([10, 10, 10, 10, 1, 1, 1, 1]), 30)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3, 4, 5, 6, 7]]  # 20 and 24, not 30 and 14


def batch_of(groups, keep, prompt=2, completion=3):
    count = len(groups)
    return Batch(
        prompt_ids=np.arange(count * prompt, dtype=np.int32), prompt_offsets=np.arange(count + 1) * prompt,
        completion_ids=100 + np.arange(count * completion, dtype=np.int32),
        completion_offsets=np.arange(count + 1) * completion,
        behaviour_logprobs=np.zeros(count * completion, np.float32), group=np.array(groups),
        truncated=np.zeros(count, bool), rewards=np.zeros((count, 1)), advantages=np.zeros(count),
        scored_lengths=np.full(count, completion), keep=np.array(keep, dtype=bool),
    )  # fmt: skip


def test_minibatches_share_out_groups_with_and_without_a_signal():
    groups = np.repeat(np.arange(6), 2)
    batch = batch_of(groups, np.isin(groups, [0, 1, 2, 3]))
    steps = plan_steps(batch, num_epochs=2, num_minibatches=2, num_ranks=1, max_tokens=1000, seed=0)
    assert len(steps) == 4
    for step in steps:
        trained = np.concatenate([part for rank in step.ranks for part in rank])
        assert len(np.unique(groups[trained])) == 2
        assert len(np.unique(groups[step.members])) == 3  # one of the dropped groups counts in each
    for epoch in (steps[:2], steps[2:]):
        assert sorted(np.concatenate([step.members for step in epoch])) == list(range(12))
    orders = [np.concatenate([step.members for step in epoch]).tolist() for epoch in (steps[:2], steps[2:])]
    assert orders[0] != orders[1]


def test_fewer_groups_than_minibatches_make_fewer_steps():
    batch = batch_of([0, 0, 1, 1], [True, True, False, False])
    assert len(plan_steps(batch, num_epochs=1, num_minibatches=8, num_ranks=1, max_tokens=9, seed=0)) == 1
    nothing = batch_of([0, 0], [False, False])
    assert plan_steps(nothing, num_epochs=3, num_minibatches=2, num_ranks=1, max_tokens=9, seed=0) == []


@pytest.mark.parametrize("padded", [False, True])
def test_the_model_reads_all_but_the_last_token_and_predicts_the_completion(padded):
    import torch

    batch = batch_of([0, 0], [True, True])
    micro = collate(batch, np.array([1, 0]), padded=padded, device=torch.device("cpu"))
    assert micro.tokens.flatten().tolist() == [2, 3, 103, 104, 0, 1, 100, 101]
    assert micro.positions.flatten().tolist() == [0, 1, 2, 3] * 2
    assert micro.targets_N.tolist() == [103, 104, 105, 100, 101, 102]
    assert micro.select_N.tolist() == [1, 2, 3, 5, 6, 7]  # token 1 of the prompt predicts the completion's first
    assert micro.flat_N.tolist() == [3, 4, 5, 0, 1, 2]
    assert micro.sequence_N.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [("constant", 0, 0.25), ("constant", 3, 1.0), ("constant", 500, 1.0), ("linear", 4, 1.0), ("linear", 9, 0.55),
     ("linear", 14, 0.1), ("linear", 99, 0.1), ("cosine", 9, 0.55), ("cosine", 14, 0.1)],
)  # fmt: skip
def test_learning_rate_over_a_fine_tune(schedule, step, share):
    settings = UpdateSettings(warmup_steps=4, schedule=schedule, schedule_steps=14, final_learning_rate_share=0.1)
    assert learning_rate_share(settings, step) == pytest.approx(share)

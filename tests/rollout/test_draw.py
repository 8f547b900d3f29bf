"""Drawing a token: the random numbers, the processed distribution, and that draws follow it."""

import math

import pytest
import torch

from components.rollout.draw import Draw, processed_logprobs, uniform
from components.rollout.sampler import Sampling

MASK = (1 << 64) - 1


def splitmix64(seed: int, position: int) -> int:
    """The published algorithm, on Python's unbounded integers."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.mark.parametrize("position", [0, 1, 7, 4095])
def test_uniform_is_splitmix64(position):
    seeds = [0, 1, 2**62, 2**63 - 1, 123456789]
    got = uniform(torch.tensor(seeds), position)
    assert got.tolist() == [(splitmix64(seed, position) >> 24) / 2**40 for seed in seeds]


def test_splitmix64_gives_its_published_first_values():  # of the generator seeded with 1234567
    assert [splitmix64(1234567, n) for n in range(2)] == [6457827717110365317, 3203168211198807973]


LOGITS = torch.tensor([[math.log(8.0), math.log(4.0), math.log(3.0), math.log(1.0)]])  # 1/2, 1/4, 3/16, 1/16


def probabilities(**changes) -> list[float]:
    sampling = Sampling(**{"temperature": 1.0, "max_tokens": 1} | changes)
    return processed_logprobs(LOGITS, sampling).exp()[0].tolist()


def test_processed_distribution_worked_out_by_hand():
    assert probabilities() == pytest.approx([8 / 16, 4 / 16, 3 / 16, 1 / 16])
    assert probabilities(top_k=2) == pytest.approx([8 / 12, 4 / 12, 0, 0])
    assert probabilities(top_p=0.5) == pytest.approx([1, 0, 0, 0])  # the first token reaches 0.5
    assert probabilities(top_p=0.51) == pytest.approx([8 / 12, 4 / 12, 0, 0])
    assert probabilities(top_p=0.76) == pytest.approx([8 / 15, 4 / 15, 3 / 15, 0])
    assert probabilities(temperature=0.5) == pytest.approx([64 / 90, 16 / 90, 9 / 90, 1 / 90])
    # top-p after top-k, on the renormalised 8/15, 4/15, 3/15: two tokens reach 0.8
    assert probabilities(top_k=3, top_p=0.79) == pytest.approx([8 / 12, 4 / 12, 0, 0])
    # temperature first: at 0.5 the first token alone reaches 0.7
    assert probabilities(temperature=0.5, top_p=0.7) == pytest.approx([1, 0, 0, 0])


def test_temperature_zero_takes_the_likeliest_token_and_reports_temperature_one():
    ids, logprobs = Draw(Sampling(temperature=0.0, max_tokens=1))(LOGITS, torch.tensor([0.99]))
    assert ids.tolist() == [0]
    assert logprobs.exp().tolist() == pytest.approx([0.5])


def test_draws_follow_the_distribution():
    count = 20_000
    ids, logprobs = Draw(Sampling(temperature=1.0, max_tokens=1))(
        LOGITS.expand(count, -1), uniform(torch.arange(count), 0)
    )
    expected = torch.tensor([8, 4, 3, 1]) / 16 * count
    chi_squared = ((torch.bincount(ids, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_squared < 16.27  # 3 degrees of freedom, p = 0.001
    assert torch.equal(logprobs, LOGITS.log_softmax(-1)[0][ids])


def test_a_token_that_is_cut_off_is_never_drawn():
    count = 5_000
    ids, _ = Draw(Sampling(temperature=1.0, max_tokens=1, top_k=2))(
        LOGITS.flip(-1).expand(count, -1), uniform(torch.arange(count), 3)
    )
    assert set(ids.tolist()) == {2, 3}


def test_the_ends_of_the_unit_interval_draw_tokens_of_the_distribution():
    ids, _ = Draw(Sampling(temperature=1.0, max_tokens=1, top_k=2))(
        LOGITS.expand(2, -1), torch.tensor([0.0, 1 - 2**-40], dtype=torch.float64)
    )
    assert ids.tolist() == [0, 1]


def test_a_row_of_nan_logits_is_told_by_its_logprob_and_leaves_others_alone():
    logits = torch.cat([LOGITS, torch.full_like(LOGITS, float("nan")), LOGITS])
    ids, logprobs = Draw(Sampling(temperature=1.0, max_tokens=1))(logits, torch.tensor([0.1, 0.1, 0.9]).double())
    assert ids.tolist() == [0, 0, 2]
    assert logprobs.isnan().tolist() == [False, True, False]


def test_slices_of_a_large_batch_draw_what_the_whole_draws(monkeypatch):
    logits, numbers = torch.randn(50, 11, generator=torch.manual_seed(0)), uniform(torch.arange(50), 2)
    whole = Draw(Sampling(temperature=0.7, max_tokens=1, top_p=0.9))(logits, numbers)
    monkeypatch.setattr("components.rollout.draw._SLICE_ELEMENTS", 33)  # three rows
    sliced = Draw(Sampling(temperature=0.7, max_tokens=1, top_p=0.9))(logits, numbers)
    assert torch.equal(whole[0], sliced[0])
    assert torch.equal(whole[1], sliced[1])

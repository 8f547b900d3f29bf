"""The simulation of pipelined rollouts against times worked out by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "pipeline_overlap", Path(__file__).parents[2] / "benchmarks/pipeline_overlap.py"
)
overlap = sys.modules["pipeline_overlap"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(overlap)
Simulation, Times = overlap.Simulation, overlap.Times


def test_without_staleness_stages_follow_each_other():
    times = Times(rollout=8, update=5, reward=2, rollout_start=3, update_start=4, reward_start=1)
    run = Simulation(times, shards=2, staleness=0, iterations=3).run()
    assert run.finished_at == [19, 38, 57]  # 3 + 8/2, 1 + 2, 4 + 5
    assert run.idle_share == pytest.approx(1 - 3 * (8 + 5) / (57 * 3))


def test_with_staleness_the_next_rollout_runs_beside_the_update():
    run = Simulation(Times(rollout=4, update=6), shards=1, staleness=1, iterations=4).run()
    # rollouts 0-4, 4-8, then each when the update two before it is done; updates 4-10, 10-16, 16-22, 22-28
    assert run.finished_at == [10, 16, 22, 28]
    assert run.idle_share == pytest.approx(1 - 4 * (4 + 6) / (28 * 2))


@pytest.mark.parametrize(("rollout", "reward", "update"), [(4, 0, 6), (9, 0, 3), (5, 4, 5), (10, 7, 2), (3, 0, 3)])
def test_in_the_long_run_the_longest_of_three_paths_decides(rollout, reward, update):
    times = Times(rollout=rollout, update=update, reward=reward)
    ends = Simulation(times, shards=1, staleness=1, iterations=200).run().finished_at
    assert (ends[-1] - ends[99]) / 100 == pytest.approx(max(rollout, update, (rollout + reward + update) / 2))
    ends = Simulation(times, shards=1, staleness=0, iterations=200).run().finished_at
    assert (ends[-1] - ends[99]) / 100 == pytest.approx(rollout + reward + update)


def test_the_slowest_shard_decides():
    even = Simulation(Times(rollout=160, update=10), shards=16, staleness=0, iterations=50).run()
    uneven = Simulation(Times(rollout=160, update=10, spread=0.3), shards=16, staleness=0, iterations=50).run()
    assert even.now == pytest.approx(50 * 20)
    assert 50 * (10 + 14) < uneven.now < 50 * (10 + 22)  # the largest of 16 log-normal factors: about 1.7

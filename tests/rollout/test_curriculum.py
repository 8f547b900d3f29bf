"""Prompts whose groups came out alike are drawn less, the others in turn; the state survives its journey."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.common.errors import DataError
from components.common.manifest import Manifest, Producer
from components.common.records import reward_fields, write_table
from components.common.store import open_store
from components.rollout.config import RolloutSettings
from components.rollout.curriculum import Turns, alike_groups, members_of
from components.rollout.prompts import choose, prompt_keys, visits_before
from tests.rollout.conftest import Job

ALL = slice(None)


def turns(num_train: int, seed: int = 0) -> Turns:
    return Turns(prompt_keys([str(n) for n in range(num_train)]), np.zeros(num_train, dtype=np.int64), seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.integers(1, 12))
def test_with_nothing_postponed_it_draws_what_the_plain_order_draws(num_train, num_prompts, seed, iterations):
    num_prompts = min(num_prompts, num_train)
    names, state = [str(n) for n in range(num_train)], turns(num_train, seed)
    for iteration in range(iterations):
        before = visits_before(state.keys_N, seed=seed, num_prompts=num_prompts, iteration=iteration)
        assert np.array_equal(before, state.turn_N)
        drawn = state.draw(num_prompts, np.ones(num_train, dtype=bool))
        assert drawn == choose(names, seed=seed, num_prompts=num_prompts, iteration=iteration)


def test_postponed_prompts_are_drawn_a_quarter_as_often():
    state, everyone = turns(40), np.ones(40, dtype=bool)
    dull, counts = set(range(0, 40, 2)), Counter()
    for _ in range(100):
        drawn = state.draw(5, everyone)
        counts.update(drawn)
        state.postpone([row for row in drawn if row in dull], 0.25)
    shares = [sum(counts[row] for row in range(40) if (row in dull) == is_dull) for is_dull in (True, False)]
    assert shares[0] / shares[1] == pytest.approx(0.25, rel=0.1)
    for is_dull in (True, False):  # among equals nobody is drawn twice more than another
        equals = [counts[row] for row in range(40) if (row in dull) == is_dull]
        assert max(equals) - min(equals) <= 1


def test_a_prompt_that_becomes_interesting_again_is_drawn_as_often_as_others():
    state, everyone = turns(10), np.ones(10, dtype=bool)
    state.postpone(range(5), 0.1)
    counts = Counter(row for _ in range(1000) for row in state.draw(1, everyone))
    assert counts[0] in range(90, 101)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=50), st.integers(0, 1000))
def test_the_state_survives_the_journey_in_metadata(ahead, first):
    keys = prompt_keys([str(n) for n in range(len(ahead))])
    state = Turns(keys, np.array(ahead, dtype=np.int64) + first, 7)
    back = Turns.load(keys, 7, state.dump(np.ones(len(state.turn_N), dtype=bool)))
    assert np.array_equal(back.turn_N, state.turn_N)


def test_the_state_of_many_prompts_is_small():
    state = turns(50_000)
    for _ in range(30):
        drawn = state.draw(1024, np.ones(50_000, dtype=bool))
        state.postpone(drawn[::3], 0.25)
    assert len(state.dump(np.ones(len(state.turn_N), dtype=bool))["ahead"]) < 25_000


def test_two_chains_share_the_prompts_without_overlap():
    keys = prompt_keys([str(n) for n in range(101)])
    even, odd = members_of(keys, 4, 1), members_of(keys, 5, 1)
    assert np.array_equal(even, ~odd)
    assert abs(int(even.sum()) - int(odd.sum())) == 1
    assert np.array_equal(even, members_of(keys, 6, 1))
    assert members_of(keys, 3, 0).all()


def test_a_half_with_too_few_prompts_is_named(make_job):
    job = make_job(num_train=24, staleness=1)
    with pytest.raises(
        DataError, match=r"there are 12 train prompts in this half \(staleness = 1 with a curriculum_weight"
    ):
        job.run(curriculum_weight=0.5, num_prompts=13)


def test_a_weight_that_would_postpone_nothing_is_refused():
    with pytest.raises(ValueError, match="must be 1"):
        RolloutSettings(curriculum_weight=0.7)
    assert RolloutSettings(curriculum_weight=0.66).curriculum_weight == 0.66


def test_a_group_is_alike_when_all_its_rewards_are_one():
    rewards = pa.table({
        "prompt_id": list("aabbccddee"), "reward": [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, None, None, 0.5, None],
    })  # fmt: skip
    assert sorted(alike_groups(rewards)) == ["a", "c", "e"]


def score(job, rollout: Manifest, iteration: int, alike) -> Manifest:
    """Publishes a scored rollout as the reward stage does: groups of which `alike` is true get equal rewards."""
    from components.common import artifacts

    table = job.table(rollout, "train")
    names, places = table.column("prompt_id").to_pylist(), table.column("sample_index").to_pylist()
    rewards = pa.table({
        "prompt_id": names, "sample_index": places, "error": pa.nulls(len(names), pa.string()),
        "reward": [1.0 if alike(name) else float(place) for name, place in zip(names, places, strict=True)],
    })  # fmt: skip
    path = write_table(rewards, job.folder / "train_rewards.parquet", reward_fields([]))
    return artifacts.publish(
        open_store(job.context.store), job.context, name="scored", kind="scored", files={path.name: path},
        producer=Producer(stage="reward", key=f"s{iteration}", settings_digest="s", code_version="v"),
        reuse=rollout.files, iteration=iteration, metadata=rollout.metadata,
    )  # fmt: skip


def next_policy(job, scored: Manifest, iteration: int) -> None:
    """Publishes the policy after an update, with the scored rollout as its parent."""
    from components.common import artifacts

    policy = Manifest.load(job.policy)
    after = artifacts.publish(
        open_store(job.context.store), job.context, name="policy", kind="policy", files={}, reuse=policy.files,
        producer=Producer(stage="update", key=f"u{iteration}", settings_digest="s", code_version="v"),
        parents={"policy": policy.digest, "scored": scored.digest}, iteration=iteration, metadata=policy.metadata,
    )  # fmt: skip
    job.policy.write_bytes(after.dump())


def test_the_stage_draws_postponed_prompts_less(make_job):
    job = make_job(num_train=24, iterations=9)
    drawn = []
    for iteration in range(8):
        rollout = job.run(
            iteration=iteration, out=str(iteration), curriculum_weight=0.25, num_prompts=6, max_completion_length=2,
            eval_every=100,
        )  # fmt: skip
        drawn.append(list(dict.fromkeys(job.table(rollout, "train").column("prompt_id").to_pylist())))
        scored = score(job, rollout, iteration, alike=lambda name: int(name.split("-")[1]) % 2 == 0)
        next_policy(job, scored, iteration + 1)
    assert sorted(name for names in drawn[:4] for name in names) == sorted(f"train-{n}" for n in range(24))
    assert all(int(name.split("-")[1]) % 2 == 1 for names in drawn[4:] for name in names)  # twelve odd ones, twice
    assert Counter(name for names in drawn[4:] for name in names) == dict.fromkeys(
        (f"train-{n}" for n in range(1, 24, 2)), 2
    )
    assert all(len(set(names)) == 6 for names in drawn)
    assert len({tuple(names) for names in drawn}) == 8
    assert all(a != b for a, b in pairwise(drawn))


def test_with_staleness_every_prompt_has_its_turn(make_job):
    job = make_job(num_train=24, iterations=9, staleness=1)
    policies, drawn = [job.policy.read_bytes()], []
    for iteration in range(8):
        job.policy.write_bytes(policies[max(0, iteration - 1)])
        rollout = job.run(
            iteration=iteration, out=str(iteration), curriculum_weight=0.25, num_prompts=6, max_completion_length=2,
            eval_every=100,
        )  # fmt: skip
        drawn += dict.fromkeys(job.table(rollout, "train").column("prompt_id").to_pylist())
        next_policy(job, score(job, rollout, iteration, alike=lambda name: name == "train-7"), iteration + 1)
        policies.append(job.policy.read_bytes())
    assert set(drawn[:24]) == {f"train-{n}" for n in range(24)}  # one epoch in four iterations
    counts = Counter(drawn)
    assert counts.pop("train-7") == 1
    assert set(counts.values()) <= {2, 3}  # its place went to another


def start_run(job: Job, name: str, *, first: int, iterations: int, staleness: int) -> None:
    """What configure makes of the last checkpoint becomes the job's policy and context."""
    from components.configure.config import STAGE_SECTIONS
    from components.configure.stage import run

    out = job.folder / name
    settings = {
        "fine_tune": "tune", "model": "unused", "store": job.context.store, "seed": 3, "start_from": "latest",
        "iterations": iterations, "staleness": staleness, "dataset": {"source": "gsm8k", "max_prompt_length": 16},
        "rollout": {"max_completion_length": 16},
    }  # fmt: skip
    manifests = {role: out / f"{role}.json" for role in ("policy", "optimizer", "reference", "history")}
    texts = {f"{section}_settings": out / section for section in (*STAGE_SECTIONS, "run")}
    run(settings=json.dumps(settings), parameters="{}", run=name, job_id="x", **manifests, **texts)
    job.policy = manifests["policy"]
    job.context = job.context.model_copy(update={"run": name, "first_iteration": first, "iterations": iterations})


def iterate(job: Job, first: int, iterations: int, staleness: int) -> list[list[str]]:
    """Rollouts, rewards and updates of a run; gives each iteration's prompts. Groups of even prompts come out alike."""
    policies, drawn = [job.policy.read_bytes()], []
    for number in range(iterations):
        job.policy.write_bytes(policies[max(0, number - staleness)])
        rollout = job.run(
            iteration=number, out=f"{first + number}", curriculum_weight=0.25, num_prompts=6, max_completion_length=2,
            eval_every=100,
        )  # fmt: skip
        drawn.append(list(dict.fromkeys(job.table(rollout, "train").column("prompt_id").to_pylist())))
        job.policy.write_bytes(policies[-1])
        scored = score(job, rollout, first + number, alike=lambda name: int(name.split("-")[1]) % 2 == 0)
        next_policy(job, scored, first + number + 1)
        policies.append(job.policy.read_bytes())
    return drawn


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("runs", [(5, 3), (4, 1, 3)])
def test_a_chain_of_runs_draws_what_one_run_draws(make_job, staleness, runs):
    """The state goes on from run to run, that of both chains where two take turns; without it all would be drawn."""
    whole = make_job(name="whole", num_train=24, iterations=8, staleness=staleness)
    expected = iterate(whole, 0, 8, staleness)
    job = make_job(name="chain", num_train=24, iterations=runs[0], staleness=staleness)
    drawn = iterate(job, 0, runs[0], staleness)
    for number, iterations in enumerate(runs[1:], start=2):
        first = len(drawn)
        start_run(job, f"run-{number}", first=first, iterations=iterations, staleness=staleness)
        drawn += iterate(job, first, iterations, staleness)
    assert drawn == expected
    if staleness == 0:
        assert all(int(name.split("-")[1]) % 2 for names in drawn[4:] for name in names)


def test_what_was_collected_meanwhile_is_a_fresh_start(make_job, caplog):
    job = make_job(num_train=24, iterations=2)
    iterate(job, 0, 2, 0)
    store = open_store(job.context.store)
    store.delete("manifests/tune/run/0001/scored.json")
    start_run(job, "run-2", first=2, iterations=1, staleness=0)
    names = [f"train-{n}" for n in range(24)]
    assert iterate(job, 2, 1, 0) == [[names[row] for row in choose(names, seed=3, num_prompts=6, iteration=2)]]

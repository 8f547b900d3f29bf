"""The reward stage end to end: shards in, one scored artifact out."""

import itertools
import json
import math
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pytest

from components.common.errors import ArtifactNotFound, DataError, StageError
from components.common.manifest import Manifest
from components.reward import landlock
from components.reward.merge import rollout_metrics
from components.reward.scoring import make_batches

NUMERIC = [{"name": "numeric_match"}]


def test_rewards_and_metrics_by_hand(case, rows_of):
    rows = (
        rows_of("p", ["#### 4", "#### 5", "four", "#### 4."], finish_reason="length")
        + rows_of("q", ["4", "4", "4", "4"])
        + rows_of("r", ["", "4", "5", "6"])
    )
    rows[8]["finish_reason"] = "error"
    functions = [{"name": "numeric_match", "weight": 2.0}, {"name": "length_penalty", "arguments": {"per_token": 0.1}}]
    scored = case.score(rows, functions=functions)
    assert [row["rewards/numeric_match"] for row in scored] == [1, 0, 0, 1, 1, 1, 1, 1, None, 1, 0, 0]
    rewards = [1.4, -0.6, -0.4, 1.3, 1.9, 1.9, 1.9, 1.9, None, 1.9, -0.1, -0.1]
    for row, reward in zip(scored, rewards, strict=True):
        assert row["reward"] == (None if reward is None else pytest.approx(reward))
    assert [row["error"] for row in scored] == [None] * 8 + ["not generated"] + [None] * 3
    known = [reward for reward in rewards if reward is not None]
    mean = sum(known) / 11  # 11.0 / 11
    variance = sum((reward - mean) ** 2 for reward in known) / 10
    # p: mean 0.425, squares .950625 1.050625 .680625 .765625; q: 0; r: mean 17/30, twice (2/3)^2 and once (4/3)^2
    spreads = [math.sqrt(3.4475 / 3), 0, math.sqrt((16 / 9 + 4 / 9 + 4 / 9) / 2)]
    metrics = case.manifest.metrics
    assert metrics == {
        "reward": pytest.approx(1.0),
        "reward_std": pytest.approx(math.sqrt(variance)),
        "reward_group_std": pytest.approx(sum(spreads) / 3),
        "frac_reward_zero_std": pytest.approx(1 / 3),
        "reward/errors": 1,
        "rewards/numeric_match/mean": pytest.approx(7 / 11),
        "rewards/numeric_match/std": pytest.approx(math.sqrt((7 - 49 / 11) / 10)),
        "rewards/length_penalty/mean": pytest.approx(-3.0 / 11),
        "rewards/length_penalty/std": pytest.approx(
            math.sqrt(sum((0.1 * n - 3.0 / 11) ** 2 for n in (6, 6, 4, 7, 1, 1, 1, 1, 1, 1, 1)) / 10)
        ),
        "completions/mean_length": pytest.approx(30 / 11),
        "completions/min_length": 1,
        "completions/max_length": 7,
        "completions/clipped_ratio": pytest.approx(4 / 11),
        "rollout/num_completions": 12,
        "rollout/seconds": 2,
    }


def test_eval_rows_are_scored_apart(case, rows_of):
    shard = case.rollout(train=rows_of("p", ["4", "5"]), eval=rows_of("e", ["4", "4", "4", "6"]))
    metrics = case.run(shard, functions=NUMERIC).metrics
    assert metrics["reward"] == 0.5
    assert metrics["eval/reward"] == 0.75
    assert metrics["eval/rewards/numeric_match/mean"] == 0.75
    assert metrics["eval/completions/mean_length"] == 1
    assert case.table("train").column("reward").to_pylist() == [1, 0]
    assert case.table("eval").column("reward").to_pylist() == [1, 1, 1, 0]


def test_eval_alone_is_scored(case, rows_of):
    shard = case.rollout(eval=rows_of("e", ["4", "5"]))
    assert set(case.run(shard, functions=NUMERIC).names) == {"eval.parquet", "eval_rewards.parquet"}
    assert case.manifest.metrics["eval/reward"] == 0.5
    assert "reward" not in case.manifest.metrics


def test_the_rollouts_files_are_not_sent_again(case, rows_of):
    shard = case.rollout(train=rows_of("p", ["4", "5"]))
    sent = json.loads(shard.read_text())["files"][0]
    manifest = case.run(shard, functions=NUMERIC)
    assert {file.name: file.key for file in manifest.files}["train.parquet"] == sent["key"]
    assert manifest.metadata["sampling"] == {"temperature": 1.0}
    assert manifest.iteration == 2


def shards(case, rows_of):
    return [
        case.rollout("completions-00", train=rows_of("p", ["4", "5"]) + rows_of("q", ["5", "4"])),
        case.rollout("completions-01", train=rows_of("r", ["44", "4", "5"]), eval=rows_of("e", ["4"])),
        case.rollout("completions-02", train=rows_of("s", ["6"]), eval=rows_of("f", ["5"])),
    ]


def test_the_order_of_shards_does_not_matter(case, rows_of):
    three = shards(case, rows_of)
    results = [case.run(*order, functions=NUMERIC) for order in itertools.permutations(three)]
    assert {result.digest for result in results} == {results[0].digest}
    assert all(result.metrics == results[0].metrics for result in results)
    assert {result.producer.key.partition(":")[0] for result in results} == {"sha256"}
    rewards = {(row["prompt_id"], row["sample_index"]): row["reward"] for row in case.table("train").to_pylist()}
    assert rewards == {
        ("p", 0): 1, ("p", 1): 0, ("q", 0): 0, ("q", 1): 1, ("r", 0): 0, ("r", 1): 1, ("r", 2): 0, ("s", 0): 0
    }  # fmt: skip
    assert results[0].metrics["eval/reward"] == 0.5
    assert results[0].metrics["rollout/num_completions"] == 10
    assert results[0].metrics["rollout/seconds"] == 2


def test_metrics_of_shards_are_those_of_one_job(case, rows_of):
    """They run side by side: counts and speeds add up, the slowest is the time, the rest is the mean."""
    one = {
        "rollout/num_tokens": 100.0,
        "rollout/eval_num_failed": 1.0,
        "rollout/tokens_per_second": 50.0,
        "rollout/seconds": 2.0,
        "rollout/engine_start_seconds": 9.0,
        "rollout/mean_length": 10.0,
        "other": 1.0,
    }
    two = one | {"rollout/tokens_per_second": 30.0, "rollout/seconds": 5.0, "rollout/mean_length": 20.0}
    manifest = Manifest.load(case.rollout(train=rows_of("p", ["4"])))
    shards = [manifest.model_copy(update={"metrics": metrics}) for metrics in (one, two)]
    assert rollout_metrics(shards) == {
        "rollout/num_tokens": 200, "rollout/eval_num_failed": 2, "rollout/tokens_per_second": 80, "rollout/seconds": 5,
        "rollout/engine_start_seconds": 9, "rollout/mean_length": 15,
    }  # fmt: skip


def test_workers_and_batches_do_not_change_scores(case, rows_of):
    rows = [row for n in range(40) for row in rows_of(f"p{n}", [f"#### {n % 7}", "#### 4", f"{n}"])]
    first = [(row["reward"], row["error"]) for row in case.score(rows, functions=NUMERIC)]
    again = case.score(rows, functions=NUMERIC, batch_size=4, num_workers=3)
    assert [(row["reward"], row["error"]) for row in again] == first


def test_a_shard_of_another_policy_is_refused(case, rows_of):
    one = case.rollout("completions-00", train=rows_of("p", ["4"]))
    two = case.rollout("completions-01", train=rows_of("q", ["4"], policy_digest="blake3:other"))
    with pytest.raises(DataError, match="completions of 2 policies in one iteration: blake3:other, blake3:policy"):
        case.run(one, two)


def test_a_sample_that_comes_twice_is_refused(case, rows_of):
    one = case.rollout("completions-00", train=rows_of("p", ["4", "5"]))
    two = case.rollout("completions-01", train=rows_of("p", ["6"]))
    with pytest.raises(DataError, match="sample 0 of prompt p comes 2 times"):
        case.run(one, two)
    with pytest.raises(DataError, match="was one shard given twice"):
        case.run(one, one)


def test_a_torn_group_is_refused(case, rows_of):
    rows = rows_of("p", ["4", "5"])
    shard = case.rollout(train=[rows[0], *rows_of("q", ["4"]), rows[1]])
    with pytest.raises(DataError, match="the samples of a prompt are not together"):
        case.run(shard)


def test_shards_of_different_iterations_or_sampling_are_refused(case, rows_of):
    one = case.rollout("completions-00", train=rows_of("p", ["4"]))
    late = case.rollout("completions-01", iteration=3, train=rows_of("q", ["4"]))
    with pytest.raises(StageError, match="want shards of one iteration, got iterations"):
        case.run(one, late)
    hot = case.rollout("completions-02", metadata={"sampling": {"temperature": 2.0}}, train=rows_of("q", ["4"]))
    with pytest.raises(DataError, match="shards sampled differently"):
        case.run(one, hot)


def test_nothing_to_score_is_an_error(case, rows_of, tmp_path):
    with pytest.raises(StageError, match="the rollout has no completions"):
        case.run(case.rollout())
    with pytest.raises(StageError, match="reward was given no rollout"):
        case.run()
    with pytest.raises(ArtifactNotFound, match="no manifest at"):
        case.run(tmp_path / "absent.json")


def test_rows_no_function_applies_to_have_no_reward(case, rows_of):
    scored = case.score(rows_of("p", ["4", "5"], answer=None) + rows_of("q", ["4"]), functions=NUMERIC)
    assert [row["reward"] for row in scored] == [None, None, 1]
    assert case.manifest.metrics["reward"] == 1


def test_a_function_that_does_not_apply_leaves_the_total_to_the_others(case, rows_of):
    functions = [*NUMERIC, {"name": "length_penalty", "weight": 0.5, "arguments": {"per_token": 0.1}}]
    scored = case.score(rows_of("p", ["44"], answer=None) + rows_of("q", ["4"]), functions=functions)
    assert [row["rewards/numeric_match"] for row in scored] == [None, 1]
    assert [row["reward"] for row in scored] == pytest.approx([-0.1, 0.95])


@hypothesis.settings(deadline=None)
@hypothesis.given(sizes=st.lists(st.integers(1, 9), max_size=20), limit=st.integers(1, 12))
def test_batches_hold_whole_groups_and_every_row_once(sizes, limit):
    ids = [f"p{number}" for number, size in enumerate(sizes) for _ in range(size)]
    batches = list(make_batches(pa.table({"prompt_id": pa.array(ids, pa.string())}), limit))
    assert [row for start, end in batches for row in range(start, end)] == list(range(len(ids)))
    groups = [ids[start:end] for start, end in batches]
    assert sum(len(set(group)) for group in groups) == len(sizes)
    assert all(len(group) <= limit or len(set(group)) == 1 for group in groups)


def test_a_stage_that_ran_is_not_run_again(case, rows_of, capsys):
    shard = case.rollout(train=rows_of("p", ["4"]))
    first = case.run(shard, functions=NUMERIC)
    case.runs -= 1
    assert case.run(shard, functions=NUMERIC) == first
    assert "done before, nothing to do" in capsys.readouterr().out


WITHOUT_NAMESPACES = """
import socket, sys
from components.reward.sandbox import Limits, confine, readable_paths
with socket.create_server(("127.0.0.1", 0)) as server:
    missing = confine(Limits(scratch=sys.argv[1], memory_gb=8, network=False, readable=readable_paths([])))
    print(missing)
    try:
        socket.create_connection(server.getsockname(), timeout=2)
        print("connected")
    except PermissionError:
        print("no connection")
"""


@pytest.mark.skipif(landlock.abi() < 4, reason="this kernel's Landlock does not know TCP")
@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("setpriv")), reason="util-linux is not installed")
def test_where_namespaces_are_refused_tcp_still_is(tmp_path):
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set -all --inh-caps -all "
    command = ["unshare", "-Ur", "sh", "-c", forbid + '--no-new-privs -- "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are not permitted here")
    result = subprocess.run(
        [*command, sys.executable, "-c", WITHOUT_NAMESPACES, str(tmp_path)], capture_output=True, text=True, check=True
    )
    missing, connection = result.stdout.strip().splitlines()
    assert connection == "no connection"
    assert (
        "no namespaces here (Operation not permitted): UDP and processes left over are up to the pod's own" in missing
    )

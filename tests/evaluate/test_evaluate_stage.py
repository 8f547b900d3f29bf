"""The stage on real artifacts: history, gain over the baseline, the report and what is refused."""

import json
import subprocess
import sys

import pytest

from components.common.errors import DataError, SettingsError, StageError
from components.common.manifest import Manifest
from components.common.settings import dump_stage, validate
from components.evaluate.config import EvaluateSettings


@pytest.fixture
def two_iterations(story, sample):
    """Policy 0 solves half of a and nothing of b; policy 1 everything."""
    before = {
        "a": [sample("12", True), sample("13", False)],
        "b": [sample("8", False), sample("9", False, finish="length")],
    }
    after = {"a": [sample("12", True)] * 2, "b": [sample("7", True)] * 2}
    train = {"c": [sample("0", True, extra=0.5), sample("1", False)]}
    first = story.evaluate(
        0, story.policy(0), story.scored(0, {"completions/mean_length": 1.5}, eval=before, train=train)
    )
    policy = story.policy(
        1, metrics={"kl": 0.01, "entropy": 0.7, "frac_reward_zero_std": 0.9}, metadata={"seconds": 9.0}
    )
    second = story.evaluate(1, policy, story.scored(1, eval=after), first.path)
    return first, second


def test_the_history_gathers_what_every_stage_told(two_iterations):
    first, second = two_iterations
    start, last = second.json("history.json")["records"]
    assert [start["iteration"], last["iteration"]] == [0, 1]
    assert start["metrics"]["completions/mean_length"] == 1.5
    assert last["metrics"] | {"reward": 0.5, "kl": 0.01, "entropy": 0.7} == last["metrics"]
    assert "frac_reward_zero_std" not in last["metrics"]  # of the batch before, not of these samples
    assert {name: last["seconds"][name] for name in ("rollout", "reward", "update")} == {
        "rollout": 4.0, "reward": 1.0, "update": 9.0,
    }  # fmt: skip
    assert first.json("history.json")["records"] == [start]


def test_metrics_and_gain_against_the_baseline(two_iterations):
    first, second = two_iterations
    assert first.manifest.metrics["eval/pass@1"] == pytest.approx(0.25)
    assert first.manifest.metrics["eval/completions/clipped_ratio"] == pytest.approx(0.25)
    assert first.manifest.metrics["eval/completions/mean_length"] == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert "eval/pass@1_gain" not in first.manifest.metrics
    assert second.manifest.metrics["eval/pass@1"] == 1.0
    assert second.manifest.metrics["eval/pass@1_gain"] == pytest.approx(0.75)
    # the gains of the two prompts are 0.5 and 1, so the interval's ends are those
    assert second.manifest.metrics["eval/pass@1_gain_low"] == pytest.approx(0.5)
    assert second.manifest.metrics["eval/pass@1_gain_high"] == pytest.approx(1.0)
    assert second.json("prompts.json")["baseline"]["iteration"] == 0
    assert second.json("prompts.json")["latest"]["values"]["eval/pass@1"] == {"a": 1.0, "b": 1.0}


def test_page_and_summary_are_those_of_the_artifact(two_iterations):
    _, second = two_iterations
    assert second.report == second.files["report.html"]
    assert "25.0 % → **100.0 %**" in second.summary
    assert "| 1 | 100.0 % | 0.500 |  | 0.010 | 0.700 |" in second.summary
    assert not list(second.report_path.parent.glob(".*"))


def test_the_report_shows_samples_of_baseline_and_present(two_iterations):
    first, second = two_iterations
    rows = second.json("samples.json")
    assert {(row["iteration"], row["split"]) for row in rows} == {(0, "eval"), (0, "train"), (1, "eval")}
    [train_best] = [row for row in first.json("samples.json") if row["split"] == "train" and row["right"]]
    assert train_best["rewards"] == {"match": 1.0, "bonus": 0.5}
    assert train_best["truth"] == {"answer": "0"}
    # rewards 1.5 and 0: mean 0.75, sample standard deviation 1.0607
    assert train_best["advantage"] == pytest.approx(0.75 / (1.06066 + 1e-4), abs=1e-4)


def test_an_iteration_without_held_out_samples_keeps_the_history(story, sample, two_iterations):
    _, second = two_iterations
    third = story.evaluate(2, story.policy(2), story.scored(2, train={"c": [sample("0", True)] * 2}), second.path)
    records = third.json("history.json")["records"]
    assert not any(name.startswith("eval/") for name in records[-1]["metrics"])
    assert third.manifest.metrics == {}
    assert third.json("prompts.json") == second.json("prompts.json")
    assert '<span class="after" id="pass-after">100.0' in third.report


def test_a_repeated_stage_hands_out_the_same(story, two_iterations, monkeypatch):
    first, _ = two_iterations
    first.report_path.unlink()
    monkeypatch.setattr("components.evaluate.stage.render", lambda report: pytest.fail("rendered again"))
    folder = story.folder
    again = story.evaluate(
        0, folder / "run-1-0-policy.manifest.json", folder / "run-1-0-scored.manifest.json",
        folder / "run-1-0-history.manifest.json",
    )  # fmt: skip
    assert again.report == first.report
    assert again.manifest == first.manifest


def test_the_next_run_evaluates_its_first_policy_anew_without_a_second_record(make_story, sample, two_iterations):
    _, second = two_iterations
    other = make_story(run="run-2")
    held_out = {"a": [sample("12", True)] * 2, "b": [sample("7", False)] * 2}
    third = other.evaluate(1, other.policy(1), other.scored(1, eval=held_out), second.path)
    records = third.json("history.json")["records"]
    assert [(record["iteration"], record["run"]) for record in records] == [(0, "run-1"), (1, "run-1")]
    assert (records[1]["metrics"]["eval/pass@1"], records[1]["metrics"]["kl"]) == (0.5, 0.01)
    assert third.manifest.metrics["eval/pass@1_gain"] == pytest.approx(0.25)


def test_another_policy_of_the_same_iteration_takes_the_place(make_story, sample, two_iterations):
    first, _ = two_iterations
    other = make_story(run="run-2")
    branch = other.evaluate(
        1, other.policy(1, "branch"), other.scored(1, eval={"a": [sample("12", True)] * 2}), first.path
    )
    again = other.evaluate(2, other.policy(2), other.scored(2, train={"a": [sample("1", True)] * 2}), branch.path)
    records = again.json("history.json")["records"]
    assert [(record["iteration"], record["run"]) for record in records] == [(0, "run-1"), (1, "run-2"), (2, "run-2")]
    assert "kl" not in records[1]["metrics"]


def test_other_held_out_prompts_are_not_paired(make_story, sample, two_iterations, caplog):
    _, second = two_iterations
    other = make_story(run="run-2")
    third = other.evaluate(1, other.policy(1), other.scored(1, eval={"new": [sample("1", True)] * 2}), second.path)
    assert "eval/pass@1" in third.manifest.metrics
    assert "eval/pass@1_gain" not in third.manifest.metrics


def test_a_sample_without_reward_is_wrong(story, sample):
    held_out = {"a": [sample("12", True), sample("", None, finish="error", error="engine gone")]}
    found = story.evaluate(0, story.policy(0), story.scored(0, eval=held_out))
    assert found.manifest.metrics["eval/pass@1"] == 0.5
    assert found.manifest.metrics["eval/reward"] == 1.0
    [failed] = [row for row in found.json("samples.json") if row["error"]]
    assert (failed["reward"], failed["advantage"], failed["right"]) == (None, None, False)


def test_which_reward_and_from_where_on_is_a_setting(story, sample):
    held_out = {"a": [sample("12", False, extra=0.6), sample("12", True, extra=0.2)]}
    policy, scored = story.policy(0), story.scored(0, eval=held_out)
    found = story.evaluate(0, policy, scored, correct_reward="bonus", correct_threshold=0.1)
    assert found.manifest.metrics["eval/pass@1"] == 1.0


def test_an_unknown_reward_is_named_with_the_known_ones(story, sample):
    with pytest.raises(SettingsError, match=r"one of the reward functions \(match, bonus\), got 'matsch'"):
        story.evaluate(0, story.policy(0), story.scored(0, eval={"a": [sample("1", True)]}), correct_reward="matsch")


def test_settings_are_checked():
    with pytest.raises(SettingsError, match="answer_pattern is not a regular expression"):
        validate(EvaluateSettings, {"answer_pattern": "("})
    with pytest.raises(SettingsError, match="correct_rewards is not a setting; did you mean correct_reward"):
        validate(EvaluateSettings, {"correct_rewards": "x"})
    with pytest.raises(SettingsError, match=r"k_values\.1"):
        validate(EvaluateSettings, {"k_values": [1, 0]})


def test_samples_of_another_policy_are_refused(story, sample):
    first, second = story.policy(0), story.policy(1)
    scored = story.scored(0, eval={"a": [sample("12", True)] * 2}, train={"c": [sample("0", True)] * 2})
    message = rf"2 of 2 eval samples were written by policy {story.digests[0]}, the one to judge is {story.digests[1]}"
    with pytest.raises(DataError, match=message):
        story.evaluate(1, second, scored)
    with pytest.raises(StageError, match="evaluation 1 was given the policy of iteration 0"):
        story.evaluate(1, first, scored)


def test_train_samples_of_another_policy_are_refused_too(story, sample):
    story.policy(0)
    scored, second = story.scored(0, train={"c": [sample("0", True)] * 2}), story.policy(1)
    with pytest.raises(DataError, match="2 of 2 train samples were written by policy"):
        story.evaluate(1, second, scored)


def test_the_table_is_bounded_and_mixed(story, sample):
    long = "y" * 5000
    held_out = {f"p{i}": [sample(f"{i} {long}", True), sample(f"{i} bad {long}", False)] for i in range(40)}
    found = story.evaluate(0, story.policy(0), story.scored(0, eval=held_out), table_rows=30, table_characters=300)
    rows = found.json("samples.json")
    assert len(rows) == 30
    assert max(len(row["completion"]) for row in rows) < 400
    assert "characters left out" in rows[0]["completion"]
    assert 9 < sum(row["right"] for row in rows) < 21
    assert len({row["prompt_id"] for row in rows}) >= 15
    assert len(found.report) < 200_000
    assert story.evaluate(1, story.policy(1), story.scored(1, eval=held_out), table_rows=0).json("samples.json") == []


def test_shards_are_one_record(story, sample):
    """Two rollouts behind one scored artifact: the slower one is the time, their metrics are those the reward has."""
    rows = {"a": [sample("12", True)] * 2}
    policy, scored = story.policy(0), story.scored(0, {"rollout/num_tokens": 200.0}, eval=rows)
    for shard, seconds in ((1, 3.0), (2, 7.0)):
        path = story.folder / f"shard{shard}.txt"
        path.write_text(str(shard))
        story.artifact(
            f"completions-{shard:02d}", "rollout", {"train.parquet": path}, stage="rollout",
            metadata={"seconds": seconds},
            metrics={"rollout/num_tokens": 100.0},
        )  # fmt: skip
    shards = [story.folder / f"run-1-0-completions-0{shard}.manifest.json" for shard in (1, 2)]
    parents = {f"completions[{i}]": Manifest.load(path).digest for i, path in enumerate(shards)}
    merged = Manifest.load(scored).model_copy(update={"parents": parents})
    scored.write_bytes(merged.dump())
    record = story.evaluate(0, policy, scored).json("history.json")["records"][0]
    assert record["metrics"]["rollout/num_tokens"] == 200.0
    assert record["seconds"]["rollout"] == 7.0


def test_the_command_line_is_the_same_stage(story, sample, tmp_path):
    policy, scored = story.policy(0), story.scored(0, eval={"a": [sample("12", True)] * 2})
    history = story.artifact("history", "evaluation")
    settings = tmp_path / "settings.json"
    settings.write_text(dump_stage(story.context, EvaluateSettings()))
    arguments = {
        "settings": settings, "iteration": 0, "policy": policy, "scored": scored, "history": history,
        "evaluation": tmp_path / "e.json", "report": tmp_path / "r.html", "summary": tmp_path / "s.md",
    }  # fmt: skip
    command = [sys.executable, "-m", "components.evaluate"]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True, capture_output=True)
    assert Manifest.load(tmp_path / "e.json").metrics["eval/pass@1"] == 1.0
    assert "pass@1 on 1 held-out prompts: **100.0 %**" in (tmp_path / "s.md").read_text()
    assert json.loads((tmp_path / "r.html").read_text().split('id="data">')[1].split("</script>")[0])["samples"]

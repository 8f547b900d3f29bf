"""The stage on real artifacts: pointer, reasons, repetition, export, registry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.common import champion
from components.common.errors import ArtifactError, SettingsError, StageError
from components.common.manifest import Manifest
from components.common.settings import dump_stage
from components.publish import export, stage
from components.publish.config import PublishSettings

WRONG, HALF, ALL = (False, False), (True, False), (True, True)


@pytest.fixture
def fine_tune(make_story, sample):
    """Evaluates policies: `fine_tune(story, [WRONG, HALF])` gives the last policy and its evaluation."""

    def make(story, outcomes, *, first=0, history=None):
        for iteration, right in enumerate(outcomes, start=first):
            held_out = {
                prompt: [sample(f"{prompt}{i}", one) for i, one in enumerate(right)] for prompt in ("a", "b", "c")
            }
            policy = story.policy(iteration, f"{story.context.run} {iteration}")
            evaluated = story.evaluate(iteration, policy, story.scored(iteration, eval=held_out), history)
            history = evaluated.path
        return policy, history

    return make


def publish(story, policy, evaluation, name="decision", **settings):
    """Runs the stage; gives the decision as written and the Markdown."""
    paths = {role: story.folder / f"{story.context.run}-{name}" / role for role in ("decision", "summary")}
    text = dump_stage(story.context, PublishSettings(**{"bootstrap_samples": 200} | settings))
    stage.run(settings=text, policy=policy, evaluation=evaluation, **paths)
    manifest = Manifest.load(paths["decision"])
    key = next(file.key for file in manifest.files if file.name == "decision.json")
    return json.loads(story.store.get_bytes(key)), paths["summary"].read_text()


def test_better_than_the_baseline_becomes_the_first_champion(make_story, fine_tune):
    story = make_story()
    policy, evaluation = fine_tune(story, [WRONG, HALF])
    decision, summary = publish(story, policy, evaluation)
    assert decision["accepted"]
    assert decision["rival"]["role"] == "baseline"
    assert decision["difference"] == {"value": 0.5, "low": 0.5, "high": 0.5, "paired_prompts": 3}
    assert summary.startswith("# sums: accepted\n")
    assert "| candidate | 1 | run-1 | 0.5000 | 0.5000 to 0.5000 |" in summary
    pointer = champion.read(story.store, "sums")
    assert (pointer.digest, pointer.value, pointer.previous) == (Manifest.load(policy).digest, 0.5, None)
    assert Manifest.parse(story.store.get_bytes(pointer.manifest), where="x") == Manifest.load(policy)
    assert Manifest.parse(story.store.get_bytes(pointer.evaluation), where="x") == Manifest.load(evaluation)


def test_no_better_than_the_baseline_is_rejected(make_story, fine_tune):
    story = make_story()
    decision, summary = publish(story, *fine_tune(story, [HALF, HALF]))
    assert not decision["accepted"]
    assert "it is not above +0.0000" in summary
    assert champion.read(story.store, "sums") is None


def test_later_runs_are_held_against_the_champion(make_story, fine_tune):
    first = make_story()
    policy, evaluation = fine_tune(first, [WRONG, HALF])
    publish(first, policy, evaluation)
    before = champion.read(first.store, "sums")

    worse = make_story(run="run-2")
    decision, _ = publish(worse, *fine_tune(worse, [WRONG], first=2, history=evaluation))
    assert (decision["accepted"], decision["rival"]["role"], decision["rival"]["run"]) == (False, "champion", "run-1")
    assert champion.read(first.store, "sums") == before

    better = make_story(run="run-3")
    decision, _ = publish(better, *fine_tune(better, [ALL], first=2, history=evaluation))
    assert decision["accepted"]
    assert decision["difference"]["value"] == pytest.approx(0.5)
    after = champion.read(first.store, "sums")
    assert (after.run, after.iteration, after.previous) == ("run-3", 2, before.manifest)


@pytest.mark.parametrize("first", [True, False])
def test_a_champion_that_was_moved_meanwhile_is_not_overwritten(make_story, fine_tune, monkeypatch, first, tmp_path):
    """Two runs are judged at once: the slower changes nothing, and is judged against the quicker when repeated."""
    begun = make_story(run="run-0")
    history = fine_tune(begun, [WRONG, HALF])[1]
    if not first:
        publish(begun, *fine_tune(make_story(run="run-1"), [WRONG, HALF]))
    quick, slow = (make_story(run=run) for run in ("quick", "slow"))
    quicks, slows = (fine_tune(story, [ALL], first=2, history=history) for story in (quick, slow))
    outcome = stage._outcome

    def overtaken(*arguments):
        decided = outcome(*arguments)
        monkeypatch.setattr(stage, "_outcome", outcome)
        publish(quick, *quicks)
        return decided

    monkeypatch.setattr(stage, "_outcome", overtaken)
    target = tmp_path / "model"
    with pytest.raises(StageError, match="another run moved the champion of sums"):
        publish(slow, *slows, export_dir=str(target))
    assert champion.read(slow.store, "sums").run == "quick" and not target.exists()
    decision, _ = publish(slow, *slows, export_dir=str(target))
    assert (decision["accepted"], decision["rival"]["run"]) == (False, "quick")


def test_a_stage_that_ended_after_moving_the_pointer_repeats_its_decision(make_story, fine_tune, monkeypatch):
    story = make_story()
    policy, evaluation = fine_tune(story, [WRONG, HALF])
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(story, policy, evaluation)
    pointer = champion.read(story.store, "sums")
    assert pointer is not None
    decision, _ = publish(story, policy, evaluation)
    assert decision["accepted"]
    assert decision["rival"]["role"] == "baseline"
    assert champion.read(story.store, "sums") == pointer


def test_a_finished_stage_is_not_done_again(make_story, fine_tune, monkeypatch):
    story = make_story()
    policy, evaluation = fine_tune(story, [WRONG, HALF])
    first = publish(story, policy, evaluation)
    monkeypatch.setattr(stage, "decide", lambda *_: pytest.fail("decided again"))
    assert publish(story, policy, evaluation, name="again") == first


def test_other_metrics_can_decide(make_story, fine_tune):
    story = make_story()
    decision, _ = publish(story, *fine_tune(story, [HALF, ALL]), metric="eval/pass@2")
    assert (decision["accepted"], decision["candidate"]["value"], decision["rival"]["value"]) == (False, 1.0, 1.0)


def test_a_metric_that_was_not_measured_is_refused(make_story, fine_tune):
    story = make_story()
    with pytest.raises(StageError, match=r"publish\.metric = 'eval/pass@64' is not among .*eval/pass@1"):
        publish(story, *fine_tune(story, [WRONG, HALF]), metric="eval/pass@64")


def test_the_evaluation_of_another_policy_is_refused(make_story, fine_tune):
    story = make_story()
    _, evaluation = fine_tune(story, [WRONG, HALF])
    with pytest.raises(StageError, match="give publish the evaluation of the policy"):
        publish(story, story.policy(7, "another"), evaluation)


def test_a_broken_pointer_is_named(make_story, fine_tune):
    story = make_story()
    policy, evaluation = fine_tune(story, [WRONG, HALF])
    story.store.put_bytes(b'{"manifest": "x"}', champion.key("sums"))
    with pytest.raises(ArtifactError, match=r"pointers/sums/champion\.json is not a champion pointer \(digest"):
        publish(story, policy, evaluation)


def test_export_is_a_plain_folder_and_replaces_only_exports(make_story, fine_tune):
    story = make_story()
    target = story.folder / "deploy" / "model"
    policy, evaluation = fine_tune(story, [WRONG, HALF])
    publish(story, policy, evaluation, export_dir=str(target))
    assert (target / "weights.txt").read_text() == "run-1 1"
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"]

    better = make_story(run="run-2")
    policy, evaluation = fine_tune(better, [ALL], first=2, history=evaluation)
    (story.folder / "home").mkdir()
    (story.folder / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(SettingsError, match="is no earlier export"):
        publish(better, policy, evaluation, export_dir=str(story.folder / "home"))
    assert (story.folder / "home" / "thesis.txt").read_text() == "precious"
    publish(better, policy, evaluation, export_dir=str(target), name="second")
    assert (target / "weights.txt").read_text() == "run-2 2"
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"]


@pytest.mark.parametrize("swaps", [True, False])
def test_an_export_is_always_there(make_story, fine_tune, monkeypatch, swaps):
    """The folder is never moved away where the file system swaps; elsewhere the new model takes its place as well."""
    story, moved = make_story(), []
    target = story.folder / "model"
    policy, evaluation = fine_tune(story, [WRONG, HALF])
    publish(story, policy, evaluation, export_dir=str(target))
    policy, evaluation = fine_tune(make_story(run="run-2"), [ALL], first=2, history=evaluation)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (moved.append(path), rename(path, to))[1])
    if not swaps:
        monkeypatch.setattr(export, "_swap", lambda one, other: False)
    export.export(Manifest.load(policy), str(target))
    assert (target / "weights.txt").read_text() == "run-2 2" and (target in moved) is not swaps
    assert [path.name for path in story.folder.glob(".model.*")] == []


def test_the_command_line_is_the_same_stage(make_story, fine_tune, tmp_path):
    story = make_story()
    policy, evaluation = fine_tune(story, [WRONG, HALF])
    command = [
        sys.executable, "-m", "components.publish", "--settings", dump_stage(story.context, PublishSettings()),
        "--policy", str(policy), "--evaluation", str(evaluation),
        "--decision", str(tmp_path / "d.json"), "--summary", str(tmp_path / "s.md"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    assert Manifest.load(tmp_path / "d.json").metadata["accepted"] is True
    broken = subprocess.run(
        [*command[:-1], "/proc/none/s.md", "--policy", str(tmp_path / "no.json")], capture_output=True
    )
    assert broken.returncode == 2
    assert b"no manifest at" in broken.stderr


def test_the_registered_policy_loads_from_the_store_and_generates(
    make_story, sample, tiny_model, tmp_path, monkeypatch
):
    """MLflow end to end: one run with both iterations, a version with alias `champion`, loaded and used."""
    uri = f"sqlite:///{tmp_path}/tracking/mlflow.db"
    story = make_story(tracking_uri=uri, enabled=True)
    history = None
    for iteration, right in enumerate((WRONG, ALL)):
        files = {path.name: path for path in tiny_model.iterdir()}
        marker = tmp_path / f"marker-{iteration}.txt"
        marker.write_text(str(iteration))
        policy = story.artifact("policy", "policy", files | {"marker.txt": marker}, iteration=iteration)
        held_out = {"a": [sample(str(i), one) for i, one in enumerate(right)]}
        history = story.evaluate(iteration, policy, story.scored(iteration, eval=held_out), history).path
    decision, summary = publish(story, policy, history)
    assert decision["mlflow"]["model_version"] == "1"
    assert "This policy is version 1 in the model registry." in summary

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    import mlflow

    client = mlflow.MlflowClient()
    run = client.get_run(decision["mlflow"]["run_id"])
    assert [one.value for one in client.get_metric_history(run.info.run_id, "eval/pass_at_1")] == [0.0, 1.0]
    assert run.data.params == {"update.learning_rate": "1e-06"}
    assert {one.path for one in client.list_artifacts(run.info.run_id)} >= {"report.html", "history.json", "policies"}
    version = client.get_model_version_by_alias("sums", "champion")
    assert version.tags["grpo.digest"] == Manifest.load(policy).digest
    assert version.tags["grpo.value"] == "1"

    loaded = mlflow.pyfunc.load_model("models:/sums@champion")
    model = loaded.get_raw_model()
    assert (model.folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    short, long = model.predict(["1+", "1+2="], {"max_new_tokens": 3})
    assert max(len(short), len(long)) <= 3
    assert [short] == model.predict(["1+"], {"max_new_tokens": 3})  # padding beside a longer prompt changes nothing


def test_a_champion_that_mlflow_was_not_told_of_is_registered_by_the_next_publish(make_story, fine_tune, tmp_path):
    down = make_story(tracking_uri="http://127.0.0.1:9", enabled=True)
    policy, evaluation = fine_tune(down, [WRONG, HALF])
    decision, _ = publish(down, policy, evaluation)
    assert decision["accepted"] and decision["mlflow"] is None

    up = make_story(run="run-2", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", enabled=True)
    decision, summary = publish(up, *fine_tune(up, [WRONG], first=2, history=evaluation))
    assert not decision["accepted"]
    assert "The champion is version 1 in the model registry." in summary

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=up.context.tracking.uri, registry_uri=up.context.tracking.uri)
    (version,) = client.search_model_versions("name = 'sums'")
    assert client.get_model_version_by_alias("sums", "champion").version == version.version
    told = {name: version.tags[f"grpo.{name}"] for name in ("digest", "run", "iteration", "value", "evaluation")}
    manifest = Manifest.load(policy)
    assert told == {
        "digest": manifest.digest, "run": "run-1", "iteration": "1", "value": "0.5",
        "evaluation": Manifest.load(evaluation).digest,
    }  # fmt: skip

"""The harness: work is done once, appears when complete, and failures are told."""

import json
from pathlib import Path

import pytest

from components.common.errors import AlreadyPublished, StageError
from components.common.events import read_events
from components.common.manifest import Manifest
from components.common.settings import RunContext, Settings, dump_stage
from components.common.stage import Stage, run_stage


class Alpha(Settings):
    alpha: int = 1


@pytest.fixture
def make(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    monkeypatch.setenv("GRPO_RUN_DIR", str(run_dir))
    context = RunContext(
        fine_tune="f", run="r", store=(tmp_path / "store").as_uri(), seed=0, iterations=4, first_iteration=3
    )

    def stage(alpha=1, **changes):
        options = {"inputs": {}, "outputs": {"policy": tmp_path / "policy.json"}, "iteration": 0} | changes
        return Stage("update", Alpha, dump_stage(context, Alpha(alpha=alpha)), **options)

    stage.run_dir = run_dir
    return stage


def publish(stage):
    path = stage.work_dir / "weights.txt"
    path.write_text(f"alpha {stage.settings.alpha}")
    stage.publish("policy", kind="policy", files={"weights.txt": path}, metrics={"loss": 0.5})


def test_outputs_carry_lineage_and_the_fine_tunes_iteration(make, tmp_path):
    run_stage(make(output_offset=1), publish)
    manifest = Manifest.load(tmp_path / "policy.json")
    assert (manifest.iteration, manifest.fine_tune, manifest.run) == (4, "f", "r")
    stage = make(inputs={"policy": tmp_path / "policy.json"}, outputs={"next": tmp_path / "next.json"})

    def read(stage):
        assert (stage.fetch("policy") / "weights.txt").read_text() == "alpha 1"
        stage.publish("next", kind="policy")

    run_stage(stage, read)
    assert Manifest.load(tmp_path / "next.json").parents == {"policy": manifest.digest}


def test_the_same_work_is_not_done_twice(make, tmp_path):
    calls = []

    def body(stage):
        calls.append(stage.task)
        publish(stage)

    run_stage(make(), body)
    first = (tmp_path / "policy.json").read_bytes()
    (tmp_path / "policy.json").unlink()
    run_stage(make(), body)
    assert calls == ["update-0003"] and (tmp_path / "policy.json").read_bytes() == first
    assert [event["event"] for event in read_events(make.run_dir)] == ["start", "done", "skipped"]


def test_lost_blobs_are_made_again(make, tmp_path):
    run_stage(make(), publish)
    manifest = Manifest.load(tmp_path / "policy.json")
    make().store.delete(manifest.files[0].key)
    run_stage(make(), publish)
    assert make().store.stat(manifest.files[0].key)


def test_other_settings_under_the_same_name_are_refused(make):
    run_stage(make(), publish)
    with pytest.raises(AlreadyPublished, match="start another run"):
        run_stage(make(alpha=2), publish)


def test_a_failure_is_told_and_leaves_nothing(make, tmp_path):
    def body(stage):
        publish(stage)
        raise StageError("no such luck; try again")

    stage = make()
    with pytest.raises(StageError):
        run_stage(stage, body)
    assert not (tmp_path / "policy.json").exists() and not stage.work_dir.exists()
    failed = read_events(make.run_dir)[-1]
    assert failed["event"] == "failed" and failed["error"] == "no such luck; try again"
    assert "no such luck" in Path(failed["log"]).read_text()


def test_a_forgotten_output_is_an_error(make):
    with pytest.raises(StageError, match="without publishing policy"):
        run_stage(make(), lambda stage: None)


def test_a_half_written_event_is_left_for_later(make):
    (make.run_dir / "events.jsonl").write_text(json.dumps({"event": "start"}) + '\n{"eve')
    assert read_events(make.run_dir) == [{"event": "start"}]

"""The harness: work is done once, appears when complete, and failures are told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import components
from components.common import champion
from components.common.champion import Champion
from components.common.errors import AlreadyPublished, StageError
from components.common.events import read_events
from components.common.manifest import Manifest, code_version
from components.common.settings import RunContext, Settings, TrackingSettings, dump_stage
from components.common.stage import Stage, run_stage

COMPONENTS = Path(components.__file__).parent


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

    def stage(alpha=1, tracking=None, **changes):
        options = {"inputs": {}, "outputs": {"policy": tmp_path / "policy.json"}, "iteration": 0} | changes
        told = context.model_copy(update={"tracking": TrackingSettings(**tracking or {})})
        return Stage("update", Alpha, dump_stage(told, Alpha(alpha=alpha)), **options)

    stage.run_dir = run_dir
    return stage


def publish(stage):
    path = stage.work_dir / "weights.txt"
    path.write_text(f"alpha {stage.settings.alpha}")
    metadata = {"alpha": stage.settings.alpha}
    stage.publish("policy", kind="policy", files={"weights.txt": path}, metrics={"loss": 0.5}, metadata=metadata)


def fail(stage):
    raise StageError("it was to be left alone")


def published(make):
    """What the store has under the stage's name."""
    stage = make()
    return Manifest.parse(stage.store.get_bytes(stage.key("policy")), where="policy")


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
    (make.run_dir / "events.jsonl").unlink()  # as in a run directory that did not make it
    with pytest.raises(AlreadyPublished, match="start another run"):
        run_stage(make(alpha=2), publish)
    assert published(make).metadata["alpha"] == 1


def test_a_run_makes_its_own_work_anew_when_its_settings_were_mended(make):
    run_stage(make(), publish)
    with pytest.raises(StageError):
        run_stage(make(alpha=2), fail)
    assert published(make).metadata["alpha"] == 1  # nothing goes before its successor is there
    run_stage(make(alpha=2), publish)
    assert published(make).metadata["alpha"] == 2
    run_stage(make(alpha=2), fail)  # and that is kept


def test_what_became_champion_is_not_replaced(make):
    run_stage(make(), publish)
    manifest, stage = published(make), make()
    champion.write(
        stage.store, "f", Champion(
            manifest=stage.key("policy"), digest=manifest.digest, evaluation="e", evaluation_digest="e", run="r",
            iteration=3, metric="m", value=1.0, accepted="now",
        ),
    )  # fmt: skip
    with pytest.raises(AlreadyPublished, match="champion"):
        run_stage(make(alpha=2), publish)
    assert published(make) == manifest


def test_where_metrics_are_reported_to_is_no_other_work(make):
    run_stage(make(), publish)
    run_stage(make(tracking={"uri": "http://elsewhere"}), fail)


def test_changed_code_is_other_work(make, monkeypatch):
    run_stage(make(), publish)
    monkeypatch.setattr("components.common.stage.code_version", lambda stage: "sha256:changed")
    with pytest.raises(StageError):
        run_stage(make(), fail)


def test_the_code_version_is_that_of_the_files_wherever_they_lie(tmp_path):
    copy = tmp_path / "components"
    shutil.copytree(COMPONENTS, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def version(stage):
        code = f"from components.common.manifest import code_version; print(code_version({stage!r}))"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return result.stdout.strip()

    assert version("reward") == code_version("reward") != code_version("update")
    with (copy / "reward" / "merge.py").open("a") as file:
        file.write("# changed\n")
    assert version("reward") != code_version("reward")
    assert version("update") == code_version("update")
    with (copy / "common" / "records.py").open("a") as file:
        file.write("# changed\n")
    assert version("update") != code_version("update")


def test_sigterm_takes_the_work_directory_along(make, tmp_path):
    places = []

    def body(stage):
        (stage.work_dir / "model").write_text("large")
        places.append(stage.work_dir)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_stage(make(), body)
    assert end.value.code == 128 + signal.SIGTERM and not places[0].exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM" in read_events(make.run_dir)[-1]["error"]


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

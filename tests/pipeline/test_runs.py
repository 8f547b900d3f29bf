"""Run directories and what is shown of them: numbers, states, records, lines."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from components.common.errors import SettingsError, StageError
from components.common.settings import validate
from components.common.store import open_store
from pipeline import runs
from pipeline.live import Watcher
from pipeline.local import _outside_a_stage, _tidy
from pipeline.progress import Progress, iteration_records, iteration_table
from pipeline.reports import Report
from pipeline.runs import RunDir, locked, new_run
from pipeline.settings import PipelineSettings


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes):
    values = {"fine_tune": "f", "model": "m", "store": "file:///s", "dataset": {"source": "gsm8k"}} | changes
    return validate(PipelineSettings, values)


def event(kind, stage, iteration, task=None, **details):
    name = task or (stage if iteration is None else f"{stage}-{iteration:04d}")
    return {"time": 0.0, "event": kind, "task": name, "stage": stage, "iteration": iteration, "shard": None} | details


def done(stage, iteration, seconds=1.0, **metrics):
    return event("done", stage, iteration, seconds=seconds, metrics=metrics)


# --- numbers and states ----------------------------------------------------------------------------------------------


def test_a_run_is_numbered_after_those_in_the_store_too(here):
    store = open_store((here / "store").as_uri())
    assert new_run("f", store).name == "run-0001"
    (here / "runs" / "f" / "run-0002").mkdir(parents=True)
    assert new_run("f", store).name == "run-0003"
    for run in ("run-0006", "some-kubeflow-id"):  # made elsewhere, or here before `rm -rf runs/f`
        store.put_bytes(b"{}", f"manifests/f/{run}/0000/policy.json")
    store.put_bytes(b"{}", "manifests/f-2/run-0009/0000/policy.json")
    assert new_run("f", store).name == "run-0007"


@pytest.mark.parametrize("name", ["store", "mlflow.db", "mlartifacts"])
def test_a_fine_tune_does_not_take_the_place_of_the_store(here, name):
    with pytest.raises(SettingsError, match=f"fine_tune = '{name}'.*choose another"):
        new_run(name, open_store((here / "store").as_uri()))


def test_a_run_whose_driver_is_gone_is_not_running(here):
    run = RunDir(here / "runs" / "f" / "run-0001")
    run.begin(settings())
    assert run.state == "interrupted"
    run.running(os.getpid())
    assert run.state == "running"
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run.running(gone.pid)
    assert run.state == "running"
    gone.communicate(b"\n")
    assert run.state == "interrupted"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    run.running(ended.pid)  # gone before it was told of
    assert run.state == "interrupted"
    ended.wait()
    assert run.state == "interrupted"
    told = {"state": "running", "process": os.getpid(), "process_started": 1.0}  # another had this number
    (run.path / "state.json").write_text(json.dumps(told))
    assert run.state == "interrupted"
    run.end("done")
    assert run.state == "done"


def test_the_refusal_of_a_second_run_names_the_process_that_drives_the_first(here):
    run = RunDir(runs.ROOT / "f" / "run-0001")
    run.begin(settings())
    with locked("f") as lock:
        driver = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
        run.running(driver.pid)
    with pytest.raises(StageError, match=f"`kill {driver.pid}`"), locked("f"):
        pass
    driver.communicate(b"\n")
    with locked("f"):
        pass


def test_a_resumed_run_keeps_what_it_is_and_its_stages_may_be_mended(here):
    run = RunDir(here / "runs" / "f" / "run-0001")
    run.begin(settings(iterations=2, model="typo"))
    run.begin(settings(iterations=3))  # nothing was done yet: all may be mended
    (run.path / "events.jsonl").write_text(json.dumps(done("configure", 0)) + "\n")
    run.begin(settings(iterations=3, publish={"metric": "eval/reward"}))
    with pytest.raises(SettingsError, match=r"iterations was 3 and is 4.*without --resume"):
        run.begin(settings(iterations=4))
    assert run.settings()["iterations"] == 3 and run.settings()["publish"]["metric"] == "eval/reward"


def test_a_run_begun_by_code_that_knew_fewer_settings_is_resumed(here):
    run = RunDir(here / "runs" / "f" / "run-0001")
    run.begin(settings())
    told = {"event": "start", "task": "rollout-0000", "key": "k"}  # and no work directory
    (run.path / "events.jsonl").write_text(json.dumps(done("configure", 0)) + "\n" + json.dumps(told) + "\n")
    known = run.settings()
    del known["start_run"]
    run.settings_path.write_text(json.dumps(known))
    run.begin(settings())
    _tidy(run)
    run.settings_path.write_text(json.dumps(known))
    with pytest.raises(SettingsError, match="start_run was None and is 'run-0007'"):
        run.begin(settings(start_from="latest", start_run="run-0007"))


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_an_update_belongs_to_the_policy_it_made_as_in_the_report():
    events = [
        event("start", "reward", 0),
        done("reward", 0, 2.0, reward=0.25, kl=9.0),  # only the update tells the KL
        done("evaluate", 0, 3.0, **{"eval/pass@1": 0.5}),
        done("update", 0, 4.0, kl=0.125, loss=-1.0, reward=0.25),
        done("reward", 1, 5.0, reward=0.75),
    ]
    first, second = iteration_records(events)
    assert first.pop("seconds") == {"reward-0000": 2, "evaluate-0000": 3}
    assert first == {"iteration": 0, "reward": 0.25, "eval/pass@1": 0.5}
    assert second.pop("seconds") == {"update-0000": 4, "reward-0001": 5}
    assert second == {"iteration": 1, "reward": 0.75, "kl": 0.125, "loss": -1}
    assert "reward" not in iteration_records(events[:4])[1]


def test_the_table_fits_eighty_columns():
    row = {
        "iteration": 1000, "eval/pass@1": 1.0, "reward": -0.125, "completions/mean_length": 1024.5, "kl": 0.1234,
        "entropy": 1.123, "clip_ratio/region_mean": 0.123, "loss": -0.1234, "reward/errors": 123.0,
        "seconds": {"update": 12345.0},
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    console.print(iteration_table([row]))
    assert len(console.file.getvalue().splitlines()) == 2 and "12345" in console.file.getvalue()


def test_what_was_killed_in_an_earlier_try_is_not_running():
    events = [done("configure", 3), event("start", "rollout", 3), event("skipped", "configure", 3, metrics={})]
    assert [task.label for task in Progress.of(events, iterations=2).running] == ["rollout-0003"]
    progress = Progress.of(events, iterations=2, since=2)
    assert progress.running == [] and (progress.iteration, progress.last_iteration) == (3, 5)


def test_a_resumed_run_tells_what_is_new_and_what_was_kept():
    console = Console(file=io.StringIO(), width=80)
    watcher = Watcher(console, "f/run-0001", iterations=1, earlier=2)
    events = [done("configure", 0, 77.0), event("failed", "dataset", None, error="no such file", log="")]
    watcher(events)
    events += [event("skipped", "configure", 0, metrics={}), event("skipped", "dataset", None, metrics={})]
    watcher(events)
    events += [event("start", "rollout", 0), done("rollout", 0, 5.0)]
    watcher(events)
    lines = [re.sub(r"^\d+:\d\d ", "", line).strip() for line in console.file.getvalue().splitlines()]
    assert lines == ["kept from before: 2 stages, up to dataset", "rollout-0000            5.0 s"]


def test_a_summary_on_the_console_has_no_markup(here):
    summary = "# sums\n\npass@1 on 6 prompts: 1.0 % → **2.0 %**\n\n8 updates [raised].\n\n| a | b |\n|---|---|\n"
    report = Report(here, summary)
    console = Console(file=io.StringIO(), width=80)
    for sentence in report.sentences:
        console.print(sentence)
    assert console.file.getvalue() == "pass@1 on 6 prompts: 1.0 % → 2.0 %\n8 updates [raised].\n"


LOG = """
    Traceback (most recent call last):
      File "/x/components/configure/start.py", line 109, in latest
        raise ArtifactNotFound(...)
    components.common.errors.{error}: fine-tune late has no checkpoint
      use another

17:15:56.968 - ERROR - Task [96m'configure'[0m finished with status [91mFAILURE[0m
Traceback (most recent call last):
RuntimeError: Pipeline [95m'grpo-late'[0m finished with status [91mFAILURE[0m. Inner task failed: [96m'configure'[0m.
"""


@pytest.mark.parametrize("error", ["ArtifactNotFound", "AlreadyPublished", "DigestMismatch", "SettingsError"])
def test_an_error_outside_the_harness_is_found_in_the_pipelines_log(error):
    assert _outside_a_stage(LOG.format(error=error)) == (
        "configure failed: fine-tune late has no checkpoint\n  use another"
    )


def test_an_error_of_the_pipeline_itself_is_found_in_its_log():
    assert _outside_a_stage("Traceback:\nModuleNotFoundError: No module named 'kfp'\n") == (
        "the pipeline could not run: ModuleNotFoundError: No module named 'kfp'"
    )

"""Whole runs on this machine through the command line: finished, killed, interrupted, resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from components.common.events import read_events
from components.common.manifest import Manifest
from components.common.store import open_store
from pipeline.runs import RunDir

GRPO = [sys.executable, "-m", "pipeline.cli"]
PATIENCE_SECONDS = 1200.0
SETTINGS = """
fine_tune = "tiny"
model = {model!r}
iterations = 2
shards = {shards}

[dataset]
source = "./data.jsonl"
num_eval = 6
chat_template = false
max_prompt_length = 16

[rollout]
engine = "transformers"
num_prompts = 6
group_size = 4
max_completion_length = 4
eval_group_size = 2

[[reward.functions]]
name = "./reward.py:digits"
arguments = {{ length = 4 }}

[update]
learning_rate = 1e-3
num_minibatches = 2
"""
REWARD = """
def digits(completions, length, **columns):
    return [sum(text[i : i + 1].isdigit() for i in range(length)) / length for text in completions]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model):
    """A folder like a user's: settings, data and a reward function."""
    folder = tmp_path_factory.mktemp("project")
    rng = random.Random(0)
    rows = [{"prompt": f"{number}: {rng.randrange(10)}+1=", "answer": "x"} for number in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    (folder / "settings.toml").write_text(SETTINGS.format(model=str(tiny_model), shards=1))
    return folder


def grpo(project, *arguments, ok=True):
    result = subprocess.run([*GRPO, *arguments], cwd=project, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    if ok:
        assert result.returncode == 0, result.stdout + result.stderr + logs(project)
    return result


def logs(project):
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in project.glob("runs/*/run-*/logs/*.log"))


def policies(project, fine_tune, run):
    """Digest of every policy of a run."""
    store = open_store((project / "runs" / "store").as_uri())
    keys = [stat.key for stat in store.list(f"manifests/{fine_tune}/{run}/") if stat.key.endswith("/policy.json")]
    return {key.split("/")[3]: Manifest.parse(store.get_bytes(key), where=key).digest for key in keys}


def wait_for(project, fine_tune, task, kind="start"):
    """Until a task of the newest run has told of an event."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    run = project / "runs" / fine_tune / "run-0001"
    while time.monotonic() < deadline:
        if any(event["task"] == task and event["event"] == kind for event in read_events(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"{task} never came to {kind}\n{logs(project)}")


def command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended meanwhile
        return ""


@pytest.fixture(scope="module")
def finished(project):
    """The run nobody disturbed."""
    return grpo(project, "run", "settings.toml")


@pytest.fixture(scope="module")
def disturbed(project, finished):
    """A run of the same settings: a stage killed, the whole run interrupted, resumed twice."""
    start = [*GRPO, "run", "settings.toml", "--set", "fine_tune=disturbed"]
    first = subprocess.Popen(start, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(project, "disturbed", "update-0000")
    stage = [one for one in psutil.Process(first.pid).children(recursive=True) if "executor_main" in command_of(one)]
    for process in stage:
        process.suspend()  # else it may be done before it is killed
    second = subprocess.run(start, cwd=project, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    for process in stage:
        process.kill()
    killed, _ = first.communicate(timeout=PATIENCE_SECONDS)

    resume = [*start, "--resume"]
    third = subprocess.Popen(resume, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(project, "disturbed", "rollout-0001")
    family = psutil.Process(third.pid).children(recursive=True)
    third.send_signal(signal.SIGINT)
    interrupted, _ = third.communicate(timeout=PATIENCE_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    last = grpo(project, "run", "settings.toml", "--set", "fine_tune=disturbed", "--resume")
    return {
        "refused": second, "killed": (first.returncode, killed), "interrupted": (third.returncode, interrupted),
        "alive": alive, "last": last,
    }  # fmt: skip


def test_a_run_learns_reports_and_ends(project, finished):
    assert "report: runs/tiny/run-0001/report.html" in finished.stdout
    assert RunDir(project / "runs" / "tiny" / "run-0001").state == "done"
    assert "<html" in (project / "runs/tiny/run-0001/report.html").read_text()
    assert set(policies(project, "tiny", "run-0001")) == {"0000", "0001", "0002"}
    assert len(set(policies(project, "tiny", "run-0001").values())) == 3


def test_show_and_report_find_the_run(project, finished):
    shown = grpo(project, "show", "tiny").stdout
    assert "tiny/run-0001  done" in shown and "pass@1" in shown
    assert len([line for line in shown.splitlines() if line.strip()[:1].isdigit()]) == 3
    assert grpo(project, "report", "tiny/run-0001").stdout.strip().endswith("run-0001/report.html")


def test_a_killed_stage_is_told_with_its_log(project, disturbed):
    status, output = disturbed["killed"]
    assert status == 1 and "update-0000 was killed" in output
    assert (project / "runs/disturbed/run-0001/logs/update-0000.log").exists()


def test_a_second_run_of_the_same_name_is_refused_meanwhile(disturbed):
    assert disturbed["refused"].returncode == 1
    assert "has a run going on" in disturbed["refused"].stderr and "--set fine_tune=" in disturbed["refused"].stderr


def test_interrupting_ends_every_child_and_says_how_to_go_on(disturbed):
    status, output = disturbed["interrupted"]
    assert status == 130 and "--resume" in output and disturbed["alive"] == []


def test_what_was_finished_is_not_run_again(project, disturbed):
    events = read_events(project / "runs/disturbed/run-0001")
    done = [event["task"] for event in events if event["event"] == "done"]
    assert len(done) == len(set(done))
    assert {"configure-0000", "dataset", "rollout-0000"} <= {e["task"] for e in events if e["event"] == "skipped"}


def test_the_disturbed_run_equals_the_undisturbed_bit_for_bit(project, finished, disturbed):
    assert policies(project, "disturbed", "run-0001") == policies(project, "tiny", "run-0001")


@pytest.fixture(scope="module")
def mended(project):
    """A run that failed in a stage, resumed with that stage's settings mended and those of others changed."""
    start = ["run", "settings.toml", "--set", "fine_tune=mended", "--set", "iterations=1"]
    failed = grpo(project, *start, "--set", "update.health.min_entropy=99", ok=False)
    tried = len(read_events(project / "runs/mended/run-0001"))
    changed = ["--set", "publish.min_improvement=-1", "--set", "evaluate.k_values=[2]"]
    resumed = grpo(project, *start, *changed, "--resume")
    return failed, tried, resumed


def test_a_failed_run_says_why_and_the_very_command_to_go_on_with(mended):
    failed, _, _ = mended
    assert failed.returncode == 1 and "update-0000 failed: " in failed.stderr and "min_entropy" in failed.stderr
    sets = "--set fine_tune=mended --set iterations=1 --set update.health.min_entropy=99"
    assert f"go on with: grpo run settings.toml {sets} --resume" in failed.stderr


def test_mended_settings_are_resumed_and_only_what_they_change_runs_again(project, mended):
    _, tried, resumed = mended
    events = read_events(project / "runs/mended/run-0001")
    again = [event["task"] for event in events[tried:] if event["event"] == "done"]
    assert again == ["evaluate-0000", "update-0000", "rollout-0001", "reward-0001", "evaluate-0001", "publish"]
    assert RunDir(project / "runs/mended/run-0001").state == "done"
    assert "kept from before: 4 stages, up to reward-0000" in resumed.stdout and "dataset  " not in resumed.stdout


def test_the_verdict_is_in_the_closing_lines_and_in_show(project, mended):
    verdict = "accepted: eval/pass@1 is "
    assert verdict in mended[2].stdout and verdict in grpo(project, "show", "mended").stdout
    assert "**" not in mended[2].stdout and mended[2].stdout.count("pass@1  ") == 1  # one table


def test_a_run_outlives_its_parent_and_can_still_be_stopped(project):
    start = [*GRPO, "run", "settings.toml", "--set", "fine_tune=orphan"]
    first = subprocess.Popen(start, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(project, "orphan", "dataset")
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert "orphan/run-0001  running" in grpo(project, "show", "orphan").stdout
    refused = grpo(project, "run", "settings.toml", "--set", "fine_tune=orphan", ok=False).stderr
    (driver,) = re.findall(r"`kill (\d+)`", refused)
    os.kill(int(driver), signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert alive == [] and "orphan/run-0001  interrupted" in grpo(project, "show", "orphan").stdout
    work = [event["work_dir"] for event in read_events(project / "runs/orphan/run-0001") if "work_dir" in event]
    assert work and not any(Path(folder).exists() for folder in work)


STUBBORN = """
import signal, subprocess, sys, time
from pathlib import Path
from pipeline import local
from pipeline.runs import RunDir
from pipeline.settings import load

def stage_that_ignores_sigterm(run):
    code = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], stdout=Path("up").open("w")).wait()

local.GRACE_SECONDS = 600
if len(sys.argv) == 2:  # the driver
    local._drive = stage_that_ignores_sigterm
    local.drive(RunDir(Path(sys.argv[1])))
else:
    popen = subprocess.Popen
    command = lambda given: [sys.executable, __file__, given[-1]]
    subprocess.Popen = lambda given, **options: popen(command(given) if "pipeline.local" in given else given, **options)
    settings = load(Path("settings.toml"), ["fine_tune=stubborn"])
    local.run_here(RunDir(Path("runs/stubborn/run-0001")), settings, lambda events: None)
"""


def ignores_sigterm(process):
    """Whether a driver was told to end, which it is once."""
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) & 1 << signal.SIGTERM - 1)


def test_a_second_ctrl_c_kills_at_once_and_the_state_is_written(project):
    (project / "stubborn.py").write_text(STUBBORN)
    parent = subprocess.Popen([sys.executable, "stubborn.py"], cwd=project, stderr=subprocess.PIPE, text=True)
    up, deadline = project / "up", time.monotonic() + PATIENCE_SECONDS
    while not (up.exists() and up.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 2
    (driver,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGINT)
    while not ignores_sigterm(driver.pid) and time.monotonic() < deadline:  # two signals at once would be one
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):  # the stage has its grace
        parent.wait(3)
    parent.send_signal(signal.SIGINT)
    _, told = parent.communicate(timeout=PATIENCE_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert alive == [] and told.rstrip().endswith("KeyboardInterrupt")
    assert RunDir(project / "runs/stubborn/run-0001").state == "interrupted"


def test_a_finished_run_is_not_resumed(project, finished):
    result = grpo(project, "run", "settings.toml", "--resume", ok=False)
    assert result.returncode == 1 and "is done" in result.stderr


def test_two_shards_cover_the_same_prompts_and_the_next_run_goes_on(project, finished):
    grpo(
        project, "run", "settings.toml", "--set", "shards=2", "--set", "start_from=latest", "--set", "iterations=1"
    )  # fmt: skip
    run = RunDir(project / "runs" / "tiny" / "run-0002")
    assert set(policies(project, "tiny", "run-0002")) == {"0002", "0003"}
    first, second = policies(project, "tiny", "run-0001"), policies(project, "tiny", "run-0002")
    assert first["0002"] == second["0002"]
    tasks = {event["task"] for event in read_events(run.path)}
    assert {"rollout-0002-shard00", "rollout-0002-shard01"} <= tasks


def test_with_staleness_every_policy_is_judged_once_by_its_own_samples(project, finished):
    """Two runs of a chain: rollout k samples from policy k - 1, which is the one its evaluation speaks of."""
    stale = ["--set", "fine_tune=stale", "--set", "staleness=1"]
    grpo(project, "run", "settings.toml", *stale)
    grpo(project, "run", "settings.toml", *stale, "--set", "start_from=latest")
    store = open_store((project / "runs" / "store").as_uri())
    found = policies(project, "stale", "run-0001") | policies(project, "stale", "run-0002")
    last = Manifest.parse(store.get_bytes("manifests/stale/run-0002/0004/evaluation.json"), where="evaluation")
    records = json.loads(store.get_bytes(next(file.key for file in last.files if file.name == "history.json")))[
        "records"
    ]
    assert [record["policy"] for record in records] == [found[f"{number:04d}"] for number in range(5)]
    assert all("eval/pass@1" in record["metrics"] for record in records)
    for run, first, end in (("run-0001", 0, 2), ("run-0002", 2, 4)):
        for iteration in range(first, end + 2):
            key = f"manifests/stale/{run}/{iteration:04d}/completions-00.json"
            rollout = Manifest.parse(store.get_bytes(key), where=key)
            sampled = max(first, iteration - 1)
            assert rollout.parents["policy"] == found[f"{sampled:04d}"]
            trains, judges = iteration < end, iteration != first + 1
            assert rollout.names == {f"{split}.parquet" for split, due in (("train", trains), ("eval", judges)) if due}


def test_a_recurring_run_ends_early_until_the_data_changes(project, finished):
    again = ["--set", "skip_unchanged_data=true", "--set", "start_from=champion", "--set", "iterations=1"]
    always = ["--set", "publish.min_improvement=-1"]  # any policy is accepted, so that there is a champion
    grpo(project, "run", "settings.toml", "--set", "fine_tune=nightly", *again, *always)
    runs = project / "runs" / "nightly"
    assert any(event["stage"] == "publish" for event in read_events(runs / "run-0001"))
    grpo(project, "run", "settings.toml", "--set", "fine_tune=nightly", *again, *always)
    assert {event["stage"] for event in read_events(runs / "run-0002")} == {"configure", "dataset"}
    assert "has not changed" in (runs / "run-0002" / "logs" / "dataset.log").read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("start_from=latest", 'has no checkpoint to go on from; use start_from = "base"'),
        ("rollout.grup_size=4", "did you mean rollout.group_size?"),
        ("model=./nowhere", "no folder"),
        ("dataset.prompt_column=question", "question"),
        ("reward.functions=[{name='./missing.py:f'}]", "No such file"),
    ],
)
def test_bad_input_is_one_clear_message(project, override, words):
    result = grpo(project, "run", "settings.toml", "--set", override, "--set", "fine_tune=bad", ok=False)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_help_answers_without_kfp():
    code = "import sys, pipeline.cli; print([m for m in ('kfp', 'torch', 'mlflow', 'pyarrow') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "[]"
    environment = os.environ | {"NO_COLOR": "1"}
    result = subprocess.run([*GRPO, "--help"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and all(
        name in result.stdout for name in ("run", "compile", "init", "show", "report")
    )
